"""The scale of a task's outputs that a served ensemble fits to validation rows, the inverse of a temperature.

Of logits times s, the log-odds of an answer of one token become s z + (s - 1) H, where z are those at s = 1 and H is
the entropy of the model's distribution over the other answers: to first order in s - 1, and exactly where these are
equally likely or there is but one. Answers of several tokens have no such formula, and no scale. The logarithm of s has
a normal prior around 0.
"""

from collections.abc import Callable

import numpy as np
from scipy.special import expit

# Standard deviation of the prior on the logarithm of a scale: few rows leave the logits as sharp as they are.
SCALE_SPREAD = 0.3
# Bounds of the logarithm.
MAX_LOG_SCALE = 2.0
_NEWTON_STEPS, _MAX_STEPS, _TOLERANCE = 10, 40, 1e-5
# Precision of a scale that stays 1, of tasks where it is not known how losses change with it.
_FIXED = 1e12

Derivatives = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def most_probable_scales(derivatives: Derivatives, precision: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Logarithms of the scales with the least loss plus precision / 2 times their square, within bounds.

    Newton's method within a bracket, and bisection where that does not end soon: the loss is convex in the scale, but
    not always in its logarithm.

    Args:
        derivatives (`Callable`):
            First and second derivative of the losses in some rows of the log-scales, from these and their numbers.
        precision (`np.ndarray` of shape `(T,)`): of the prior, in losses.
        start (`np.ndarray` of shape `(S, T)`): logarithms within the bounds to start from.
    """
    found = start.astype(np.float64)
    low, high = np.full_like(found, -MAX_LOG_SCALE), np.full_like(found, MAX_LOG_SCALE)
    active = np.arange(len(found))
    for round_number in range(_MAX_STEPS):
        own = found[active]
        slope, curvature = derivatives(own, active)
        slope, curvature = slope + precision * own, curvature + precision
        low[active] = below = np.where(slope < 0, own, low[active])
        high[active] = above = np.where(slope > 0, own, high[active])
        with np.errstate(divide="ignore", invalid="ignore"):
            new = own - slope / curvature
        # NaN is outside too.
        is_inside = (new >= below) & (new <= above) & (curvature > 0) & (round_number < _NEWTON_STEPS)
        new = np.where(slope == 0, own, np.where(is_inside, new, (below + above) / 2))
        found[active] = new
        active = active[(np.abs(new - own) >= _TOLERANCE).any(axis=1)]
        if not len(active):
            break
    return found


class ScaledRows:
    """Rows of tasks whose outputs have a scale each.

    Args:
        entropy (`np.ndarray` of shape `(n,)`):
            Entropy of the other answers of each row, in nats, sorted by task. NaN where it is not known: the scale of
            its task is then 1.
        counts (`np.ndarray` of shape `(T,)`): number of each task's rows, at least 1.
        rows_per_row (`np.ndarray` of shape `(T,)`, *optional*):
            How many rows each stands for, where these are a sample of those that a scale is fitted to.
    """

    def __init__(self, entropy: np.ndarray, counts: np.ndarray, rows_per_row: np.ndarray | None = None):
        self.counts, self.starts = counts, np.cumsum(counts) - counts
        is_unknown = np.add.reduceat(np.isnan(entropy), self.starts) > 0
        self.entropy = np.where(np.repeat(is_unknown, counts), 0.0, entropy).astype(entropy.dtype)
        stood_for = counts * (1.0 if rows_per_row is None else rows_per_row)
        self.precision = np.where(is_unknown, _FIXED, 1 / (stood_for * SCALE_SPREAD**2))

    def log_scales(self, z: np.ndarray) -> np.ndarray:
        """Logarithm of the most probable scale of each task, `(S, T)`, for log-odds `(S, n)`."""
        own = z + self.entropy.astype(z.dtype)

        def derivatives(log_scales: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            some = own if len(rows) == len(own) else own[rows]
            return self._derivatives(some, log_scales.astype(z.dtype))[1:]

        return most_probable_scales(derivatives, self.precision, np.zeros((len(z), len(self.counts))))

    def scaled(self, z: np.ndarray, log_scales: np.ndarray | None = None) -> np.ndarray:
        """Log-odds `(S, n)` of the scaled outputs, by default with the most probable scales."""
        log_scales = self.log_scales(z) if log_scales is None else log_scales
        entropy = self.entropy.astype(z.dtype)
        return self._repeated(np.exp(log_scales).astype(z.dtype)) * (z + entropy) - entropy

    def losses_with_slopes(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean loss of each task with its scale, `(T,)`, and its derivative in each row's log-odds `(n,)`.

        The scale moves with the log-odds. As the prior holds it back, it is not where the loss alone is least.
        """
        z = z[None]
        log_scales = self.log_scales(z)
        wrong, slope, curvature = self._derivatives(z + self.entropy, log_scales)
        loss = np.add.reduceat(np.logaddexp(0.0, -self.scaled(z, log_scales)[0]), self.starts) / self.counts
        scale = self._repeated(np.exp(log_scales))
        direct = -wrong * scale
        of_slope = direct + wrong * (1 - wrong) * scale**2 * (z + self.entropy)
        # At a bound, the scale does not move.
        is_free = np.abs(log_scales) < MAX_LOG_SCALE - 1e-3
        moves = np.where(is_free, slope / (curvature + self.precision), 0.0)
        return loss, ((direct - self._repeated(moves) * of_slope) / self._repeated(self.counts[None]))[0]

    def _derivatives(self, own: np.ndarray, log_scales: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Probability of the other answers `(S, n)`, and both derivatives of the mean losses in log-scales `(S, T)`."""
        moved = self._repeated(np.exp(log_scales)) * own
        wrong = expit(self.entropy.astype(own.dtype) - moved)
        product = wrong * moved
        slope = -np.add.reduceat(product, self.starts, axis=1) / self.counts
        return wrong, slope, slope + np.add.reduceat(product * (moved - product), self.starts, axis=1) / self.counts

    def _repeated(self, of_tasks: np.ndarray) -> np.ndarray:
        return np.repeat(of_tasks, self.counts, axis=1)
