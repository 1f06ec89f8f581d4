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
    """Affinity from predicted losses: entry (i, j) is how much lower than its average i's loss is beside j, `(T, T)`.

    The score is the negative predicted loss. Each row is centered by the task's mean over the subsets that contain it
    and divided by the standard deviation, so that large losses get no extra weight. Higher is better. Pairs that no
    subset contains, and the diagonal, are 0.

    Args:
        estimator (`SubsetEstimator`): makes the predictions.
        affinity_subsets (`int`, *optional*, defaults to 400): number of random subsets.
        subset_size (`int`, *optional*): number of tasks in a subset. A third of all tasks, at least 2, by default.
        seed (`int`, *optional*, defaults to 0): seed of the subsets.

    Raises:
        `ConfigurationError`: for values out of range.
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
    affinity = (raw - mean[:, None]) / np.where(spread > 0, spread, 1.0)[:, None]
    np.fill_diagonal(affinity, 0.0)
    return np.nan_to_num(affinity)
