"""Scores of rows and of tasks."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class RowScores:
    """Scores of `n` rows, in the rows' order.

    Args:
        loss (`np.ndarray` of shape `(n,)`): mean token loss of each answer, in nats.
        correct (`np.ndarray` of shape `(n,)`): 1.0 where greedy decoding gives the whole answer, else 0.0.
        margin (`np.ndarray` of shape `(n,)`): log-odds of each answer.
    """

    loss: np.ndarray
    correct: np.ndarray
    margin: np.ndarray

    def summary(self) -> "TaskScores":
        """Means over the rows, each row counting alike."""
        return TaskScores(float(self.loss.mean()), float(self.correct.mean()), len(self.loss))


@dataclass(frozen=True)
class TaskScores:
    """Scores of one task.

    Args:
        loss (`float`): mean over the rows of the mean token loss, in nats.
        accuracy (`float`): share of rows whose whole answer greedy decoding gives.
        num_examples (`int`): number of rows.
        metrics (`dict[str, float]`): figures of the generated answers, see [`AnswerMetric`], and those that a trainer's
            `compute_metrics` returns; empty without any.
    """

    loss: float
    accuracy: float
    num_examples: int
    metrics: dict[str, float] = field(default_factory=dict)


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
