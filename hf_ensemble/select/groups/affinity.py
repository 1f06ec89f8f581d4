"""Pairwise affinity: how well tasks train together."""

import numpy as np

from ..._settings import check_at_least
from ...estimate import SubsetEstimator
from ..subsets import random_subsets


def affinity_matrix(subsets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Mean score of task i over the subsets that contain both i and j, for all pairs.

    Args:
        subsets (`np.ndarray` of shape `(S, T)`): 0/1 rows.
        scores (`np.ndarray` of shape `(S, T)`): score of each task under each subset.

    Returns:
        `np.ndarray` of shape `(T, T)`: NaN for pairs that no subset contains.
    """
    together = subsets.T @ subsets
    with np.errstate(invalid="ignore", divide="ignore"):
        return (subsets * scores).T @ subsets / np.where(together == 0, np.nan, together)


def predicted_affinity(
    estimator: SubsetEstimator, affinity_subsets: int = 400, subset_size: int | None = None, seed: int = 0
) -> np.ndarray:
    """Affinity from predicted losses: how much lower than its average task i's loss is beside j, in nats, `(T, T)`.

    The average is that over the subsets that contain the task. Higher is better. Pairs that no subset contains, and the
    diagonal, are 0.

    Args:
        estimator (`SubsetEstimator`): makes the predictions.
        affinity_subsets (`int`, *optional*, defaults to 400): number of random subsets.
        subset_size (`int`, *optional*): number of tasks in a subset. A third of all tasks, at least 2, by default.
        seed (`int`, *optional*, defaults to 0): seed of the subsets.

    Raises:
        `ConfigurationError`: for values out of range.
    """
    return affinity_and_spread(estimator, affinity_subsets, subset_size, seed)[0]


def affinity_and_spread(
    estimator: SubsetEstimator, affinity_subsets: int, subset_size: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The affinity, `(T, T)`, and the standard deviation of each task's loss over the subsets that contain it, `(T,)`.

    Arguments as for [`predicted_affinity`]. Divided by the standard deviations, large losses get no extra weight.
    """
    check_at_least("affinity_subsets", affinity_subsets, 1)
    check_at_least("subset_size", subset_size, 1, optional=True)
    num_tasks = len(estimator.task_names)
    size = subset_size or max(2, round(num_tasks / 3))
    subsets = random_subsets(num_tasks, size, affinity_subsets, seed)
    scores = np.where(subsets > 0, -estimator.predict(subsets, needed=subsets > 0).loss, 0.0)
    raw = affinity_matrix(subsets, scores)
    held = np.where(subsets > 0, scores, np.nan)
    mean, spread = np.nanmean(held, axis=0), np.nanstd(held, axis=0)
    affinity = raw - mean[:, None]
    np.fill_diagonal(affinity, 0.0)
    return np.nan_to_num(affinity), np.where(spread > 0, spread, 1.0)
