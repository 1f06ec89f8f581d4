"""Prediction intervals, from the errors of predictions for observed runs and the noise of sampled rows."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from .surrogate import SurrogateProblem
from .validation_rows import ValidationRows

# Coverage that intervals aim at; with fewer than nine residuals they promise less.
LEVEL = 0.9
# Pairs of draws of an optimum, which know a standard error to about 12 %, and most training rows that they are from.
_PAIRS, _ROWS = 32, 8_000
# Above it, a row decides by itself where the optimum is, and its own gradient says nothing of other rows.
_MOST_LEVERAGE = 0.9


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


class SamplingNoise:
    """How far predicted losses are from those of all rows, because only samples of rows were captured.

    Of task k, n_k of N_k rows are captured. The optimum w of a mixture a on these is off by that of a sample. With the
    gradients e_i = u_i (grad l_i(w) + 2 l2 w) of the captured rows' part of the objective, which add up to zero at w,
    with A = sum_k a_k N_k mean_k(u) and the Hessian H of the objective, to first order

        dw = -H^-1 sum_k a_k N_k / A (mean_k(e) - mean over all rows of task k of e)

    (Binder 1983). The difference of the two means has the covariance (1 - n_k / N_k) S_k / n_k, with S_k the covariance
    of the e_i within the task (Cochran 1977, theorem 2.2), so that dw is drawn as

        dw = H^-1 sum_k a_k N_k / A sqrt((1 - n_k / N_k) / (n_k (n_k - 1))) sum_{i in k} z_i (e_i - mean_k(e))

    with independent normal z_i. The optimum follows its own rows: each e_i is divided by 1 - h_i, with the leverage of
    the row h_i = a_k u_i l_i'' x_i.H^-1 x_i / A (HC3, MacKinnon and White 1985).

    The noise of a loss L is the root of the mean of (L(w + dw) - L(w))^2, which holds its variance and the square of
    its bias, plus (1 - n / N) s^2 / n for its own n of N validation rows with losses of variance s^2. Samples that are
    stratified by label have less noise. The penalty is taken as given, which a calibration run settles.

    H and S_k are taken from at most 8,000 rows of a mixture.

    Args:
        problem (`SurrogateProblem`): captured training rows, whose weights add up to those of all rows.
        sizes (`np.ndarray` of shape `(T,)`): number of all training rows of each task, N_k.
        validation (`ValidationRows`): captured validation rows.
        validation_sizes (`np.ndarray` of shape `(T,)`): number of all validation rows of each task.
        loss_at (`Callable`): from optima `(S, k)` and a mask `(S, T)` to predicted losses `(S, T)`.
    """

    def __init__(
        self,
        problem: SurrogateProblem,
        sizes: np.ndarray,
        validation: ValidationRows,
        validation_sizes: np.ndarray,
        loss_at: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ):
        self._problem, self._sizes, self._loss_at = problem, sizes, loss_at
        self._validation, self._validation_sizes = validation, validation_sizes

    def of(self, w: np.ndarray, l2: float, mixture: np.ndarray, needed: np.ndarray) -> np.ndarray:
        """Noise of the losses at an optimum, `(T,)`, in nats; NaN where it is not needed.

        Args:
            w (`np.ndarray` of shape `(k,)`): the optimum.
            l2 (`float`): its penalty.
            mixture (`np.ndarray` of shape `(T,)`): its mixture, with the tasks' sampling weights.
            needed (`np.ndarray` of shape `(T,)`): mask of the losses.
        """
        moves = self._moves(w, l2, mixture)
        points = np.concatenate([w[None], w + moves, w - moves])
        losses = self._loss_at(points, np.repeat(needed[None], len(points), axis=0))
        variance = np.full(len(needed), np.nan)
        variance[needed] = np.square(losses[1:, needed] - losses[0, needed]).mean(axis=0)
        return np.sqrt(variance + self._validation.loss_variance(w, self._validation_sizes, needed))

    def _moves(self, w: np.ndarray, l2: float, mixture: np.ndarray) -> np.ndarray:
        """Draws of dw, `(pairs, k)`."""
        tasks = np.flatnonzero(mixture)
        counts = self._problem.counts[: len(mixture)]
        missing = 1 - counts / self._sizes
        if not (missing[tasks] > 0).any():
            return np.zeros((0, len(w)))
        total = float(mixture @ self._problem.totals)
        hessian, parts = 2 * l2 * np.eye(len(w)), []
        for task in tasks:
            x, margin, weight = self._problem.some_rows(task, max(2, _ROWS // len(tasks)))
            share = mixture[task] / total
            wrong = 1 / (1 + np.exp(margin + x @ w))
            curvature = (share * weight * wrong * (1 - wrong)).astype(x.dtype)
            hessian += (x.T * (curvature * (counts[task] / len(x)))) @ x
            if missing[task] > 0 and len(x) > 1:
                gradients = weight[:, None] * (2 * l2 * w - wrong[:, None] * x)
                scale = share * np.sqrt(missing[task] * counts[task] / (len(x) - 1))
                parts.append((scale * gradients, x, curvature))
        inverse, generator = np.linalg.inv(hessian), np.random.default_rng(0)
        drawn = np.zeros((_PAIRS, len(w)))
        for gradients, x, curvature in parts:
            leverage = curvature * np.einsum("ij,ij->i", x @ inverse.astype(x.dtype), x)
            gradients = gradients / (1 - np.minimum(leverage, _MOST_LEVERAGE))[:, None]
            drawn += generator.normal(size=(_PAIRS, len(x))) @ (gradients - gradients.mean(axis=0))
        return drawn @ inverse
