"""Agreement of predictions with the truth. Pure functions of losses `(S, T)` for `S` trained subsets and `T` tasks."""

import warnings

import numpy as np
from scipy.stats import ConstantInputWarning, spearmanr


def mean_relative_error(predicted: np.ndarray, true: np.ndarray) -> float:
    """Mean of |predicted - true| / true over all pairs."""
    return float(np.mean(np.abs(predicted - true) / true))


def correlation(predicted: np.ndarray, true: np.ndarray) -> float:
    """Pearson correlation over all pairs; NaN if either side is constant."""
    if np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return float("nan")
    return float(np.corrcoef(np.ravel(predicted), np.ravel(true))[0, 1])


def task_spearman(predicted: np.ndarray, true: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Spearman correlation over the subsets for each task, `(T,)`.

    Args:
        predicted (`np.ndarray` of shape `(S, T)`): predictions.
        true (`np.ndarray` of shape `(S, T)`): true values.
        counted (`np.ndarray` of shape `(S, T)`, *optional*):
            Mask of the pairs to include, such as each task with the subsets that contain it.

    Returns:
        `np.ndarray`: NaN for tasks with fewer than 3 subsets or constant values.
    """
    ranks = np.full(true.shape[1], np.nan)
    for task in range(true.shape[1]):
        rows = slice(None) if counted is None else counted[:, task]
        own, other = predicted[rows, task], true[rows, task]
        if len(own) >= 3:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConstantInputWarning)
                ranks[task] = spearmanr(own, other).statistic
    return ranks


def mean_or_nan(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    values = np.asarray(values, dtype=np.float64)
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def coverage(low: np.ndarray, high: np.ndarray, true: np.ndarray) -> float:
    """Share of true values within their intervals."""
    return float(np.mean((low <= true) & (true <= high)))
