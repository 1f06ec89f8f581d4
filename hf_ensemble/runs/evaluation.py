"""Scores of a run's systems, of tasks and of their rows."""

from dataclasses import dataclass, field

import numpy as np

from .._records import Record
from ..evaluate import RowScores, TaskScores


@dataclass(frozen=True)
class Evaluation(Record):
    """Scores of every system that was evaluated.

    Args:
        scores (`dict[str, dict[str, dict[str, TaskScores]]]`):
            By the prefix given to `evaluate` (`"eval"` by default), by system (`"ensemble"`, `"baseline"`,
            `"selection"`) and by task.
    """

    format = "hf_ensemble.evaluation"
    format_version = 2

    scores: dict[str, dict[str, dict[str, TaskScores]]] = field(default_factory=dict)

    @property
    def reported_split(self) -> str | None:
        """Of the splits with the most tasks, held-out test rows, else evaluation rows, else what was scored first."""
        known = [split for split in ("test", "eval", *self.scores) if split in self.scores]
        return max(known, key=lambda split: max(map(len, self.scores[split].values()), default=0), default=None)


@dataclass(frozen=True)
class RowFigures:
    """Scores of the rows of a task, in their order.

    Args:
        loss (`list[float]`): mean token loss of each answer, in nats, to six digits.
        correct (`list[float]`): 1 where greedy decoding gives the whole answer, else 0.
        metrics (`dict[str, list[float]]`): of metrics that are means over rows.
    """

    loss: list[float]
    correct: list[float]
    metrics: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: RowScores) -> "RowFigures":
        return cls(
            _six_digits(rows.loss),
            _six_digits(rows.correct),
            {name: _six_digits(own) for name, own in rows.metrics.items()},
        )

    def as_scores(self) -> RowScores:
        metrics = {name: np.array(own) for name, own in self.metrics.items()}
        return RowScores(np.array(self.loss), np.array(self.correct), metrics=metrics)


def _six_digits(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


@dataclass(frozen=True)
class EvaluatedRows(Record):
    """Scores of the single rows behind [`Evaluation`], from which intervals are made.

    Args:
        rows (`dict[str, dict[str, dict[str, RowFigures]]]`): by prefix, system and task.
    """

    format = "hf_ensemble.evaluated_rows"

    rows: dict[str, dict[str, dict[str, RowFigures]]] = field(default_factory=dict)
