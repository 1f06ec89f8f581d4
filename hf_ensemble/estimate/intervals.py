"""How wrong a prediction may be, by how wrong those were that could be checked."""

from dataclasses import dataclass

import numpy as np

LEVEL = 0.9


@dataclass(frozen=True)
class IntervalWidth:
    """Half-widths of intervals around predicted losses, on the logarithmic scale: quantile * sqrt(displacement).

    The displacement of a task is the root mean square of x_i.w over its validation rows, the way that the mixture moves
    its margins: where nothing moves, nothing can be wrong.

    Args:
        quantile (`float`): of |log(true / predicted)| / sqrt(displacement) over the runs that calibrate; NaN without
            any.
        level (`float`): nominal coverage.
    """

    quantile: float = float("nan")
    level: float = LEVEL

    @classmethod
    def fit(
        cls, predicted: np.ndarray, displacement: np.ndarray, true: np.ndarray, level: float = LEVEL
    ) -> "IntervalWidth":
        """From predictions that can be checked, all arrays `(S, T)`; a true loss that is not known is NaN.

        The quantile is that of split conformal prediction, with its correction for few residuals (Lei et al. 2018,
        Distribution-Free Predictive Inference for Regression).
        """
        known = np.isfinite(true) & (displacement > 0)
        # One loss is what c was fitted to: it says nothing of others.
        if known.sum() < 2:
            return cls(level=level)
        scores = np.sort(np.abs(np.log(true[known] / predicted[known])) / np.sqrt(displacement[known]))
        rank = int(np.ceil((len(scores) + 1) * level))
        return cls(float(scores[min(rank, len(scores)) - 1]), level)

    def around(self, predicted: np.ndarray, displacement: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends for predictions of any shape; NaN where nothing was checked."""
        factor = np.exp(self.quantile * np.sqrt(displacement))
        return predicted / factor, predicted * factor
