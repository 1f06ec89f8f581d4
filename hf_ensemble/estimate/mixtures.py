"""Subsets and mixtures of tasks as arrays."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..errors import EstimationError


def mixture_weights(tasks: Iterable[str] | Mapping[str, float], task_names: Sequence[str]) -> np.ndarray:
    """Weights `(T,)` of a subset's names or of a dict from name to weight.

    Raises:
        `EstimationError`: for an unknown task.
    """
    weights = dict(tasks) if isinstance(tasks, Mapping) else dict.fromkeys(tasks, 1.0)
    unknown = sorted(set(weights) - set(task_names))
    if unknown:
        raise EstimationError(f"Unknown tasks {unknown}; the tasks are {list(task_names)}.")
    return np.array([weights.get(name, 0.0) for name in task_names])


def epoch_length(mixtures: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Rows drawn in one epoch of each mixture `(..., T)`: sum_k a_k n_k / max_k a_k.

    Each row of the heaviest task is drawn once, on average.

    Args:
        mixtures (`np.ndarray` of shape `(..., T)`): weight of one row of each task.
        counts (`np.ndarray` of shape `(T,)`): rows of each task.
    """
    heaviest = mixtures.max(axis=-1)
    return mixtures @ counts / np.where(heaviest > 0, heaviest, 1.0)
