"""`hf-ensemble select` and `hf-ensemble group`: choices from gradients that were captured before."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._files import read_json
from ..errors import ConfigurationError
from ..estimate import ObservedRun
from ..publish import draw_choice
from ..select import DataSelector, Grouping, Selection
from ..train.scored_runs import FOLDER, ScoredRun
from .arguments import ChoiceArguments, GroupArguments, SelectArguments, parse, with_config
from .report import console, example_table, group_curve_table, path_table, selection_table

_GRADIENTS = "gradients"


def select(argv: Sequence[str]) -> Selection:
    """Choose tasks for targets; writes `selection.json` and pictures.

    Raises:
        `HfEnsembleError`: for bad arguments and stores.
    """
    (arguments,), _ = parse([SelectArguments], with_config(argv), command="select")
    selector = _selector(arguments, _clusters(arguments.clusters))
    selection = selector.select(
        arguments.target,
        arguments.method,
        arguments.max_tasks,
        max_examples=arguments.max_examples,
        max_tokens=arguments.max_tokens,
        include=arguments.include,
        exclude=arguments.exclude or (),
        metric=arguments.metric,
    )
    out, folder = console(), Path(arguments.output_dir)
    out.print(path_table(selection))
    out.print(selection_table(selection))
    _keep(selection, folder / "selection.json", out)
    if arguments.score_examples:
        scores = selector.score_examples(arguments.target, selection.weights)
        out.print(example_table(scores))
        _keep(scores, folder / "example_scores.json", out)
    return selection


def group(argv: Sequence[str]) -> Grouping:
    """Group the tasks; writes `groups.json` and pictures.

    Raises:
        `HfEnsembleError`: for bad arguments and stores.
    """
    (arguments,), _ = parse([GroupArguments], with_config(argv), command="group")
    grouping = _selector(arguments).group(
        arguments.num_groups,
        arguments.method,
        max_groups=arguments.max_groups,
        group_cost=arguments.group_cost,
        overlapping_groups=arguments.overlap,
        seed=arguments.seed,
    )
    out = console()
    out.print(group_curve_table(grouping))
    _keep(grouping, Path(arguments.output_dir) / "groups.json", out)
    return grouping


def _keep(choice: Any, file: Path, out: Any) -> None:
    choice.save(file)
    pictures = draw_choice(choice, file.parent)
    out.print(f"Saved: {file}\nPictures: {', '.join(map(str, pictures))}", soft_wrap=True)


def _selector(arguments: ChoiceArguments, clusters: Mapping[str, int] | None = None) -> DataSelector:
    """From a store, or from a run's store with all that the run knows."""
    if arguments.store is None:
        raise ConfigurationError("Expected --store FOLDER: captured gradients, or the output_dir of a run.")
    folder = Path(arguments.store)
    runs: list[ObservedRun] = []
    weights: dict[str, float] = {}
    if (folder / _GRADIENTS).is_dir():
        known = read_json(folder / "tasks.json")["tasks"]
        names = set(arguments.tasks or known)
        weights = {name: task["sampling_weight"] for name, task in known.items() if name in names}
        records = [ScoredRun(**read_json(file)) for file in sorted((folder / FOLDER).glob("*.json"))]
        # What was trained on other tasks too says nothing of these alone.
        runs = [record.as_observed() for record in records if names >= set(record.subset)]
        folder = folder / _GRADIENTS
    return DataSelector.from_store(folder, arguments.tasks, arguments.num_components, runs, weights, clusters)


def _clusters(text: Mapping[str, int] | str | None) -> Mapping[str, int] | None:
    try:
        counts = json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"clusters has to be JSON like '{{\"mr\": 5}}', found {text!r}: {error}") from error
    if counts is not None and not isinstance(counts, Mapping):
        raise ConfigurationError(f"clusters has to map tasks to numbers, found {text!r}.")
    return counts
