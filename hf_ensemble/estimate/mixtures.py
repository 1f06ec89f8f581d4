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
