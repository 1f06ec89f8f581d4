"""Scores of rows and of tasks."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .._records import NOT_KEPT


@dataclass(frozen=True)
class RowScores:
    """Scores of `n` rows, in the rows' order.

    Args:
        loss (`np.ndarray` of shape `(n,)`): mean token loss of each answer, in nats.
        correct (`np.ndarray` of shape `(n,)`): 1.0 where greedy decoding gives the whole answer, else 0.0.
        margin (`np.ndarray` of shape `(n,)`, *optional*): log-odds of each answer.
        metrics (`dict[str, np.ndarray]`, *optional*):
            Values of the rows, each of shape `(n,)`, of metrics that are means over rows.
    """

    loss: np.ndarray
    correct: np.ndarray
    margin: np.ndarray | None = None
    metrics: dict[str, np.ndarray] = field(default_factory=dict)

    def summary(self) -> "TaskScores":
        """Means over the rows, each row counting alike."""
        return TaskScores(float(self.loss.mean()), float(self.correct.mean()), len(self.loss), rows=self)

    def figures(self) -> dict[str, np.ndarray]:
        """Every figure of the rows by name; a metric called accuracy stands in place of [`correct`]."""
        return {"loss": self.loss, "accuracy": self.correct, **self.metrics}


@dataclass(frozen=True)
class TaskScores:
    """Scores of one task.

    Args:
        loss (`float`): mean over the rows of the mean token loss, in nats.
        accuracy (`float`): share of rows whose whole answer greedy decoding gives.
        num_examples (`int`): number of rows.
        metrics (`dict[str, float]`): figures of the generated answers, see [`AnswerMetric`], and those that a trainer's
            `compute_metrics` returns; empty without any.
        rows (`RowScores`, *optional*): scores of the single rows, where they are at hand; not kept with the rest.
    """

    loss: float
    accuracy: float
    num_examples: int
    metrics: dict[str, float] = field(default_factory=dict)
    rows: RowScores | None = field(default=None, compare=False, repr=False, metadata=NOT_KEPT)

    def figures(self) -> dict[str, float]:
        """Every figure by name, loss and accuracy first; a metric called accuracy stands in place of the latter."""
        return {"loss": self.loss, "accuracy": self.accuracy, **self.metrics}


def mean_scores(scores: Mapping[str, TaskScores]) -> TaskScores:
    """Mean over tasks, each counting alike, of a metric over the tasks that have it; `num_examples` is the sum."""
    values = list(scores.values())
    names = dict.fromkeys(name for own in values for name in own.metrics)
    return TaskScores(
        loss=float(np.mean([own.loss for own in values])),
        accuracy=float(np.mean([own.accuracy for own in values])),
        num_examples=sum(own.num_examples for own in values),
        metrics={name: float(np.mean([own.metrics[name] for own in values if name in own.metrics])) for name in names},
    )
