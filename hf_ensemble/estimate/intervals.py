"""Prediction intervals, from the errors of predictions for observed runs."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

# Coverage that intervals aim at; with fewer than nine residuals they promise less.
LEVEL = 0.9


@dataclass(frozen=True)
class IntervalWidth:
    """Half-width of intervals around predicted losses on the logarithmic scale: quantile * sqrt(displacement).

    Where rows are sampled, it is the root of the sum of two squares: of this one, and of the [`SamplingNoise`] relative
    to the loss times the normal quantile of the level.

    The displacement of a task is the root mean square of x_i.w over its validation rows, the change of its margins:
    the prediction is certain where nothing moves.

    Args:
        quantile (`float`):
            Quantile of |log(true / predicted)| / sqrt(displacement) over the observed runs; NaN without any.
        level (`float`): coverage that the intervals promise; NaN without a quantile.
    """

    quantile: float = float("nan")
    level: float = float("nan")

    @classmethod
    def fit(
        cls, predicted: np.ndarray, displacement: np.ndarray, true: np.ndarray, level: float = LEVEL
    ) -> "IntervalWidth":
        """Fit to predictions with known true losses, all arrays `(S, T)`; unknown true losses are NaN.

        The quantile is that of split conformal prediction, with the finite-sample correction (Lei et al. 2018,
        Distribution-Free Predictive Inference for Regression). The largest of n residuals covers another one with
        probability n / (n + 1): the level is never above it.
        """
        known = np.isfinite(true) & (displacement > 0)
        # c was fitted to a single loss, whose residual is uninformative.
        if known.sum() < 2:
            return cls()
        scores = np.sort(np.abs(np.log(true[known] / predicted[known])) / np.sqrt(displacement[known]))
        count = len(scores)
        if level * (count + 1) >= count:
            return cls(float(scores[-1]), min(level, count / (count + 1)))
        return cls(float(scores[int(np.ceil((count + 1) * level)) - 1]), level)

    def around(
        self, predicted: np.ndarray, displacement: np.ndarray, noise: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends for predictions of any shape and their noise in nats; NaN without a fitted quantile."""
        width = self.quantile * np.sqrt(displacement)
        if noise is not None:
            width = np.hypot(width, NormalDist().inv_cdf((1 + self.level) / 2) * noise / predicted)
        factor = np.exp(width)
        return predicted / factor, predicted * factor
