"""How often a training draws the rows of each task, and how long its epochs are. Arrays and dicts only."""

from collections.abc import Mapping

import numpy as np

from .._settings import check_number, check_one_of

TASK_SAMPLINGS = ("proportional", "uniform", "temperature")
# What a training averages the loss of a step over.
LOSS_WEIGHTINGS = ("tokens", "tasks", "convergence")


def row_weights(
    sampling: str, counts: Mapping[str, int], weights: Mapping[str, float], temperature: float = 2.0
) -> dict[str, float]:
    """Relative weight with which a training draws a row of each task.

    A task k of n_k rows and weight v_k gets a share of the drawn rows in proportion to

        v_k n_k            "proportional"
        v_k                "uniform"
        v_k n_k^(1/T)      "temperature", as in T5 (arXiv 1910.10683, section 3.5.2) and mT5 (arXiv 2010.11934)

    and each of its rows an n_k-th of that. The weights do not depend on which of the tasks a training is on.

    Args:
        sampling (`str`): one of `TASK_SAMPLINGS`.
        counts (`dict[str, int]`): number of rows of each task, n_k.
        weights (`dict[str, float]`): v_k of each task.
        temperature (`float`, *optional*, defaults to 2.0): T; 1 is proportional, and a large one nearly uniform.

    Returns:
        `dict[str, float]`: `weights` themselves for "proportional"; otherwise the largest is 1.
    """
    check_one_of("task_sampling", sampling, TASK_SAMPLINGS)
    check_number("sampling_temperature", temperature, 0, above=True)
    if sampling == "proportional":
        return dict(weights)
    exponent = (0.0 if sampling == "uniform" else 1.0 / temperature) - 1.0
    found = {task: weight * float(counts[task]) ** exponent for task, weight in weights.items()}
    heaviest = max(found.values())
    return {task: weight / heaviest for task, weight in found.items()}


def systematic_positions(count: int, size: int, start: float) -> np.ndarray:
    """Places of a systematic sample among ordered rows, ascending: every count/size-th from a start on, `(size,)`.

    Where the start is uniform in [0, 1), each row is drawn with the same probability (Cochran 1977, chapter 8).

    Args:
        count (`int`): number of rows.
        size (`int`): number of rows to draw, at most `count`; none is drawn twice.
        start (`float`): in [0, 1).
    """
    # Rounding may carry the last draw beyond the rows.
    return np.minimum(np.floor((np.arange(size) + start) * (count / size)).astype(int), count - 1)


def epoch_length(mixtures: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Number of rows in one epoch of each mixture: sum_k a_k n_k / max_k a_k.

    Each row of the task with the largest weight is drawn once: an epoch ends when the first task is exhausted, as in
    `datasets.interleave_datasets`.

    Args:
        mixtures (`np.ndarray` of shape `(..., T)`): weight of a row of each task.
        counts (`np.ndarray` of shape `(T,)`): number of rows of each task.
    """
    heaviest = mixtures.max(axis=-1)
    return mixtures @ counts / np.where(heaviest > 0, heaviest, 1.0)


def rows_per_epoch(weights: Mapping[str, float], counts: Mapping[str, int]) -> int:
    """Number of rows that an epoch of a training draws: [`epoch_length`], in whole rows.

    Args:
        weights (`dict[str, float]`): weight of a row of each task.
        counts (`dict[str, int]`): number of rows of each task, and maybe of others.
    """
    length = epoch_length(np.array(list(weights.values())), np.array([counts[task] for task in weights]))
    return max(1, round(float(length)))
