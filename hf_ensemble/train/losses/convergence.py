"""Weights of tasks by how their evaluation losses converge (CoBa, arXiv 2410.06741)."""

from collections.abc import Sequence

import numpy as np

# The paper's tau: how soon divergence of any task makes the absolute scores count.
_TEMPERATURE = 5.0


def convergence_weights(losses: np.ndarray, steps: Sequence[int], window: int) -> np.ndarray:
    """Weight of each task's loss, `(K,)`, with sum 1.

    With alpha_i(t) the t-th of M slopes of task i, fitted to its last N evaluation losses relative to its first one,

        RCS_i = softmax_i(K alpha_i(M) / sum_j |alpha_j(M)|)
        ACS_i = softmax_i(-N alpha_i(M) / sum_{t of the last N} |alpha_i(t)|)
        DF = min(M softmax_t(-tau M alpha_max(t) / sum_t |alpha_max(t)|)(M), 1),    alpha_max(t) = max_i alpha_i(t)
        weight_i = DF RCS_i + (1 - DF) ACS_i

    While all tasks converge the slower ones weigh more (RCS); once a task diverges, the diverging ones weigh less
    (ACS). Slopes begin after the first half of a window, with two evaluations at least; until then weights are equal.

    Args:
        losses (`np.ndarray` of shape `(E, K)`): evaluation losses of each task, in the order of the evaluations.
        steps (`Sequence[int]`): optimizer steps before each evaluation.
        window (`int`): N, the number of evaluations that a slope is fitted to.
    """
    losses = np.asarray(losses, dtype=np.float64)
    num_tasks = losses.shape[1]
    first = max(2, (window + 1) // 2)
    if len(losses) < first or not np.isfinite(losses).all():
        return np.full(num_tasks, 1.0 / num_tasks)
    ratios = losses / np.maximum(losses[0], np.finfo(float).tiny)
    slopes = np.array([_slopes(steps[:end][-window:], ratios[:end][-window:]) for end in range(first, len(losses) + 1)])
    relative = _softmax(_shares(num_tasks * slopes[-1], slopes[-1]))
    recent = slopes[-window:]
    absolute = _softmax(np.array([_shares(-len(recent) * own, own)[-1] for own in recent.T]))
    worst = slopes.max(axis=1)
    count = len(slopes)
    divergence = min(count * _softmax(_shares(-_TEMPERATURE * count * worst, worst))[-1], 1.0)
    return divergence * relative + (1.0 - divergence) * absolute


def _slopes(steps: Sequence[int], ratios: np.ndarray) -> np.ndarray:
    """Slope of a line through each column of `(n, K)`, by least squares."""
    x = np.asarray(steps, dtype=np.float64) - np.mean(steps)
    return x @ ratios / (x @ x)


def _shares(values: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """Values over the sum of the slopes' absolute values; 0 where nothing moves."""
    total = np.abs(slopes).sum()
    return values / total if total > 0 else np.zeros_like(values)


def _softmax(values: np.ndarray) -> np.ndarray:
    shifted = np.exp(values - values.max())
    return shifted / shifted.sum()
