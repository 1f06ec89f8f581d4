"""Subsets and mixtures of tasks as arrays."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .._settings import check_number, checked_names
from ..errors import EstimationError


def mixture_weights(tasks: Iterable[str] | Mapping[str, float], task_names: Sequence[str]) -> np.ndarray:
    """Convert a subset of names, or a dict from name to weight, to an array of weights `(T,)`.

    Raises:
        `EstimationError`: for unknown and repeated tasks, and weights that are no numbers.
    """
    names = checked_names("tasks", tasks, task_names, EstimationError)
    weights = tasks if isinstance(tasks, Mapping) else dict.fromkeys(names, 1.0)
    for name, weight in weights.items():
        check_number(f"The weight of {name!r}", weight, error=EstimationError)
    return np.array([weights.get(name, 0.0) for name in task_names])


def epoch_length(mixtures: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Number of rows in one epoch of each mixture: sum_k a_k n_k / max_k a_k.

    Each row of the task with the largest weight is sampled once on average.

    Args:
        mixtures (`np.ndarray` of shape `(..., T)`): weight of a row of each task.
        counts (`np.ndarray` of shape `(T,)`): number of rows of each task.
    """
    heaviest = mixtures.max(axis=-1)
    return mixtures @ counts / np.where(heaviest > 0, heaviest, 1.0)
