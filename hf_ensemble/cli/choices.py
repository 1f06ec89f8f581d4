"""What `hf-ensemble select` and `hf-ensemble group` share: where the gradients come from and where choices go."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from .._files import remove_leftovers
from ..errors import ConfigurationError
from ..publish import draw_choice
from ..runs import RunDirectory, RunRecord, run_selector
from ..select import Choice, DataSelector
from .choice_arguments import ChoiceArguments


def selector_of(
    arguments: ChoiceArguments,
    clusters: Mapping[str, int] | None = None,
    continued_length: float | None = None,
    other_lengths: Sequence[float] = (),
) -> DataSelector:
    """From a store, or from a run's store with all that the run knows.

    Args:
        arguments (`ChoiceArguments`): the flags.
        clusters (`dict[str, int]`, *optional*): see [`DataSelector.from_store`].
        continued_length (`float`, *optional*):
            For trainings of this length that go on from the adapter for all tasks: gradients are those at this adapter.
        other_lengths (`Sequence[float]`, *optional*): further lengths that groups may have.

    Raises:
        `ConfigurationError`: without a store, and for an `output_dir` that holds a run.
        `HfEnsembleError`: for a damaged store or run.
    """
    if arguments.store is None:
        raise ConfigurationError("Expected --store FOLDER: captured gradients, or the output_dir of a run.")
    if RunDirectory(arguments.output_dir).has(RunRecord):
        raise ConfigurationError(
            f"Expected another folder than a run's own, whose choice would be overwritten, as --output_dir; found "
            f"{arguments.output_dir!r}."
        )
    run = RunDirectory(arguments.store)
    own = run.gradients if continued_length is None else run.baseline_gradients
    options = {
        "tasks": arguments.tasks,
        "num_components": arguments.num_components,
        "clusters": clusters,
        "device": arguments.estimate_device,
        "other_lengths": other_lengths,
    }
    if own.is_dir():
        return run_selector(run, continued_length=continued_length, **options)
    if continued_length is not None and run.has(RunRecord):
        raise ConfigurationError(
            f"The run in {arguments.store!r} holds no gradients at its adapter for all tasks: its groups began where "
            "that adapter did. Leave --group_initialization out, or set it to fresh."
        )
    length = 1.0 if continued_length is None else continued_length
    return DataSelector.from_store(arguments.store, length=length, **options)


def save_choice(choice: Choice, folder: str, out: Console) -> None:
    """Write a choice and its pictures, and say where."""
    directory = RunDirectory(folder)
    remove_leftovers(directory.path)
    file = directory.where(type(choice))
    choice.save(file)
    pictures = draw_choice(choice, Path(folder))
    out.print(f"Saved: {file}\nPictures: {', '.join(map(str, pictures))}", soft_wrap=True)
