"""Prediction intervals, from the errors of predictions for observed runs."""

from dataclasses import dataclass

import numpy as np

LEVEL = 0.9


@dataclass(frozen=True)
class IntervalWidth:
    """Half-width of intervals around predicted losses on the logarithmic scale: quantile * sqrt(displacement).

    The displacement of a task is the root mean square of x_i.w over its validation rows, the change of its margins:
    the prediction is certain where nothing moves.

    Args:
        quantile (`float`):
            Quantile of |log(true / predicted)| / sqrt(displacement) over the observed runs; NaN without any.
        level (`float`): nominal coverage.
    """

    quantile: float = float("nan")
    level: float = LEVEL

    @classmethod
    def fit(
        cls, predicted: np.ndarray, displacement: np.ndarray, true: np.ndarray, level: float = LEVEL
    ) -> "IntervalWidth":
        """Fit to predictions with known true losses, all arrays `(S, T)`; unknown true losses are NaN.

        The quantile is that of split conformal prediction, with the finite-sample correction (Lei et al. 2018,
        Distribution-Free Predictive Inference for Regression).
        """
        known = np.isfinite(true) & (displacement > 0)
        # c was fitted to a single loss, whose residual is uninformative.
        if known.sum() < 2:
            return cls(level=level)
        scores = np.sort(np.abs(np.log(true[known] / predicted[known])) / np.sqrt(displacement[known]))
        rank = int(np.ceil((len(scores) + 1) * level))
        return cls(float(scores[min(rank, len(scores)) - 1]), level)

    def around(self, predicted: np.ndarray, displacement: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends for predictions of any shape; NaN without a fitted quantile."""
        factor = np.exp(self.quantile * np.sqrt(displacement))
        return predicted / factor, predicted * factor
