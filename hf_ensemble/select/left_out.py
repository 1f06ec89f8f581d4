"""What a training on all tasks is predicted to be without one of them."""

from dataclasses import dataclass

import numpy as np

from ..estimate import SubsetEstimator

# Normal quantile: chance alone puts a mean this many standard errors below zero one time in twenty.
_CLEAR = 1.645
_MOST_OF = 0.8
# Number of tasks up to which each is left out once.
_MOST_LEFT_OUT = 200


@dataclass(frozen=True)
class LeftOut:
    """What leaving one task out of the training on all is predicted to do to the others.

    Args:
        mean_change (`float`): of the others' mean loss, in nats; negative where they do better without it.
        standard_error (`float`): of the mean change, over the validation rows.
        num_better (`int`): number of the others whose loss falls.
        num_others (`int`): number of the others.
    """

    mean_change: float
    standard_error: float
    num_better: int
    num_others: int

    @property
    def is_harmful(self) -> bool:
        """Whether the others clearly do better without the task, not some of them alone: these have groups for that."""
        is_clear = self.mean_change < -_CLEAR * self.standard_error
        return is_clear and self.num_better >= _MOST_OF * self.num_others


def effects_of_leaving_out(estimator: SubsetEstimator) -> dict[str, LeftOut]:
    """Predicted effect on the others of leaving out each task, by its name, compared with the training on all.

    Empty for a single task, and for more than 200: above it, the predictions take as long as a grouping.
    """
    names = list(estimator.task_names)
    size = len(names)
    if not 1 < size <= _MOST_LEFT_OUT:
        return {}
    found = {}
    # The first row is the training on all.
    prediction = estimator.predict(np.vstack([np.ones(size), 1.0 - np.eye(size)]))
    for index, name in enumerate(names):
        others = np.arange(size) != index
        change = (prediction.loss[1 + index] - prediction.loss[0])[others]
        optimum, all_optimum = prediction.coefficients[1 + index], prediction.coefficients[0]
        spread = estimator.score_spread(optimum[None], all_optimum, others / others.sum())
        found[name] = LeftOut(float(change.mean()), float(spread[0]), int((change < 0).sum()), size - 1)
    return found
