"""What `hf-ensemble select` and `hf-ensemble group` share: where the gradients come from and where choices go."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from .._files import remove_leftovers
from ..errors import ConfigurationError
from ..publish import draw_choice
from ..runs import RunDirectory, run_selector
from ..select import Choice, DataSelector
from .choice_arguments import ChoiceArguments


def selector_of(arguments: ChoiceArguments, clusters: Mapping[str, int] | None = None) -> DataSelector:
    """From a store, or from a run's store with all that the run knows.

    Raises:
        `ConfigurationError`: without a store.
        `HfEnsembleError`: for a damaged store or run.
    """
    if arguments.store is None:
        raise ConfigurationError("Expected --store FOLDER: captured gradients, or the output_dir of a run.")
    run = RunDirectory(arguments.store)
    if run.gradients.is_dir():
        return run_selector(run, arguments.tasks, arguments.num_components, clusters=clusters)
    return DataSelector.from_store(arguments.store, arguments.tasks, arguments.num_components, clusters=clusters)


def save_choice(choice: Choice, folder: str, out: Console) -> None:
    """Write a choice and its pictures, and say where."""
    directory = RunDirectory(folder)
    remove_leftovers(directory.path)
    file = directory.where(type(choice))
    choice.save(file)
    pictures = draw_choice(choice, Path(folder))
    out.print(f"Saved: {file}\nPictures: {', '.join(map(str, pictures))}", soft_wrap=True)
