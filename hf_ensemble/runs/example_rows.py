"""The training rows that help most and least, with their text."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .._records import Record
from ..select import ExampleScores

# Rows that are shown of each end of a task, and characters of each.
_NUM_SHOWN = 4
_MOST_CHARACTERS = 600
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class ShownRow:
    """One training row.

    Args:
        example_id (`str`): its id.
        score (`float`): see [`ExampleScores`].
        text (`str`): its tokens as text, cut to 600 characters.
    """

    example_id: str
    score: float
    text: str


@dataclass(frozen=True)
class TaskRows:
    """Scores of a task's training rows.

    Args:
        num_rows (`int`): number of rows with a score.
        num_harmful (`int`): number of rows with a negative score.
        quantiles (`list[float]`): minimum, quartiles and maximum of the scores.
        lowest (`list[ShownRow]`): the rows with the lowest scores, lowest first.
        highest (`list[ShownRow]`): the rows with the highest scores, highest first; none that is among the lowest.
        num_without_score (`int`): number of further rows, whose gradients were not captured.
    """

    num_rows: int
    num_harmful: int
    quantiles: list[float]
    lowest: list[ShownRow]
    highest: list[ShownRow]
    num_without_score: int = 0


@dataclass(frozen=True)
class ExampleRows(Record):
    """The training rows of a run that help the targets most and least.

    Args:
        targets (`dict[str, float]`): weight of each target task's loss.
        tasks (`dict[str, TaskRows]`): by task.
        summary (`str`): one sentence.
    """

    format = "hf_ensemble.example_rows"
    format_version = 2

    targets: dict[str, float]
    tasks: dict[str, TaskRows]
    summary: str

    @classmethod
    def of(cls, scores: ExampleScores, text_of: Callable[[str, str], str]) -> "ExampleRows":
        """From scores of rows.

        Args:
            scores (`ExampleScores`): of the rows.
            text_of (`Callable`): from a task and an example id to the row as text.
        """

        def shown(task: str, names: list[str]) -> list[ShownRow]:
            own = scores.scores[task]
            return [ShownRow(name, own[name], _cut(text_of(task, name))) for name in names]

        tasks, without = {}, scores.num_without_score()
        for task, own in scores.scores.items():
            if not own:
                continue
            ranked = sorted(own, key=own.get)
            values = np.array(list(own.values()))
            lowest = ranked[: min(_NUM_SHOWN, (len(ranked) + 1) // 2)]
            highest = ranked[::-1][: min(_NUM_SHOWN, len(ranked) - len(lowest))]
            tasks[task] = TaskRows(
                num_rows=len(values),
                num_harmful=int((values < 0).sum()),
                quantiles=np.quantile(values, _QUANTILES).tolist(),
                lowest=shown(task, lowest),
                highest=shown(task, highest),
                num_without_score=without.get(task, 0),
            )
        return cls(scores.targets, tasks, scores.summary)


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"
