"""How well tasks train together."""

import numpy as np

from ..estimate import SubsetEstimator
from .subsets import random_subsets


def affinity_matrix(subsets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """T_ij, the mean score of task i over the subsets that hold both i and j.

    Args:
        subsets (`np.ndarray` of shape `(S, T)`): 0/1 rows.
        scores (`np.ndarray` of shape `(S, T)`): score of each task under each subset.

    Returns:
        `np.ndarray` of shape `(T, T)`: NaN where no subset holds both.
    """
    together = subsets.T @ subsets
    with np.errstate(invalid="ignore", divide="ignore"):
        return (subsets * scores).T @ subsets / np.where(together == 0, np.nan, together)


def predicted_affinity(
    estimator: SubsetEstimator, num_subsets: int = 400, subset_size: int | None = None, seed: int = 0
) -> np.ndarray:
    """Affinity from predicted losses: entry (i, j) is how much lower than usual i's loss is beside j, `(T, T)`.

    The score is the negative predicted loss. Each row is centred by the task's mean over the subsets that hold it and
    divided by its spread, so that a task with large losses counts no more than another; a higher entry is better. Pairs
    that no subset held get 0, the diagonal too.

    Args:
        estimator (`SubsetEstimator`): predictions.
        num_subsets (`int`, *optional*, defaults to 400): random subsets.
        subset_size (`int`, *optional*): tasks of a subset; a third of them, and at least 2, by default.
        seed (`int`, *optional*, defaults to 0): seed of the subsets.
    """
    num_tasks = len(estimator.task_names)
    size = subset_size or max(2, round(num_tasks / 3))
    subsets = random_subsets(num_tasks, size, num_subsets, seed)
    scores = -estimator.predict(subsets).loss
    raw = affinity_matrix(subsets, scores)
    held = np.where(subsets > 0, scores, np.nan)
    mean, spread = np.nanmean(held, axis=0), np.nanstd(held, axis=0)
    affinity = (raw - mean[:, None]) / np.where(spread > 0, spread, 1.0)[:, None]
    np.fill_diagonal(affinity, 0.0)
    return np.nan_to_num(affinity)
