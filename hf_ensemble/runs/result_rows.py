"""Figures of every system as tables of text."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..evaluate import SystemIntervals, TaskScores, mean_scores
from .systems import ordered_systems, system_name

# Figures of which less is better.
LOWER_IS_BETTER = ("loss",)
_TITLES = {"loss": "Loss", "accuracy": "Accuracy"}


@dataclass(frozen=True)
class ResultTable:
    """One figure of every task and system.

    Args:
        title (`str`): what it shows.
        columns (`list[str]`): the first is that of the tasks.
        rows (`list[list[str]]`): one per task.
        mean (`list[str]`): the last row.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    mean: list[str]


def result_tables(
    scores: Mapping[str, Mapping[str, TaskScores]], intervals: Mapping[str, SystemIntervals], split: str
) -> list[ResultTable]:
    """The loss, the accuracy, and every further metric.

    A figure that is 0 for every system and task gets no table: the accuracy of texts that no model reproduces word by
    word.

    Args:
        scores (`dict[str, dict[str, TaskScores]]`): by system and task.
        intervals (`dict[str, SystemIntervals]`): of the systems that have some.
        split (`str`): which rows were scored.
    """
    systems = ordered_systems(scores)
    means = {system: mean_scores(scores[system]).figures() for system in systems}
    names = dict.fromkeys(name for own in means.values() for name in own)
    tasks = dict.fromkeys(task for system in systems for task in scores[system])
    rows = "evaluation" if split == "eval" else split
    found = []
    for name in names:
        figures = {
            system: {task: own.figures().get(name) for task, own in scores[system].items()} for system in systems
        }
        if name not in LOWER_IS_BETTER and not any(value for own in figures.values() for value in own.values()):
            continue
        unit = " (nats per token, lower is better)" if name == "loss" else ""
        known = {system: own for system, own in intervals.items() if name in own.mean}
        found.append(
            ResultTable(
                title=f"{_TITLES.get(name, name)}{unit} on {rows} rows",
                columns=["task", *map(system_name, systems)],
                rows=[
                    [
                        task,
                        *(
                            _cell(figures[system].get(task), known[system].tasks.get(task, {}).get(name))
                            if system in known
                            else _cell(figures[system].get(task))
                            for system in systems
                        ),
                    ]
                    for task in tasks
                ],
                mean=[
                    "mean",
                    *(
                        _cell(means[system].get(name), known[system].mean[name] if system in known else None)
                        for system in systems
                    ),
                ],
            )
        )
    return found


def as_text(table: ResultTable) -> str:
    """A table in plain text."""
    lines = [table.columns, *table.rows, table.mean]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.columns))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([table.title, *text])


def _cell(value: float | None, interval: tuple[float, float] | None = None) -> str:
    if value is None:
        return "-"
    if interval is None:
        return f"{value:.3f}"
    return f"{value:.3f} ({interval[0]:.3f}–{interval[1]:.3f})"
