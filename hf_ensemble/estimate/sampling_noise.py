"""The noise of predictions from samples of rows."""

from collections.abc import Callable, Mapping

import numpy as np

from .surrogate import SurrogateProblem
from .validation_rows import ValidationRows

# Pairs of draws of an optimum, which know a standard error to about 12 %, and most training rows that they are from.
_PAIRS, _ROWS = 32, 8_000
# Above it, a row decides by itself where the optimum is, and its own gradient says nothing of other rows.
_MOST_LEVERAGE = 0.9


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
    its bias, plus (1 - n / N) s^2 / n for its own n of N validation rows with losses of variance s^2, times the squared
    slope of the calibration. Where an observed run's loss over all N rows is known, to which predictions are in
    proportion, s^2 is the variance of the residuals l_i(w) - L(w) / L(w0) l_i(w0) from the losses at this run's optimum
    w0, a ratio estimate (Cochran 1977, 6.3). It is unknown where a single one of several rows was captured. Samples
    that are stratified by label have less noise. The penalty is taken as given, which a calibration run settles.

    H and S_k are taken from at most 8,000 rows of a mixture.

    Args:
        problem (`SurrogateProblem`): captured training rows, whose weights add up to those of all rows.
        sizes (`np.ndarray` of shape `(T,)`): number of all training rows of each task, N_k.
        validation (`ValidationRows`): captured validation rows.
        validation_sizes (`np.ndarray` of shape `(T,)`): number of all validation rows of each task.
        loss_at (`Callable`): from optima `(S, k)` and a mask `(S, T)` to predicted losses `(S, T)`.
        slopes_at (`Callable`):
            From an optimum `(k,)` and a mask `(T,)` to the slopes of predicted losses in the mean losses of the rows,
            `(T,)`.
        anchors (`dict[int, np.ndarray]`):
            By the index of a task, the optimum `(k,)` of a run whose loss over all of the task's validation rows is
            known.
    """

    def __init__(
        self,
        problem: SurrogateProblem,
        sizes: np.ndarray,
        validation: ValidationRows,
        validation_sizes: np.ndarray,
        loss_at: Callable[[np.ndarray, np.ndarray], np.ndarray],
        slopes_at: Callable[[np.ndarray, np.ndarray], np.ndarray],
        anchors: Mapping[int, np.ndarray],
    ):
        self._problem, self._sizes, self._loss_at, self._slopes_at = problem, sizes, loss_at, slopes_at
        self._validation, self._validation_sizes, self._anchors = validation, validation_sizes, anchors

    def of(self, w: np.ndarray, l2: float, mixture: np.ndarray, needed: np.ndarray) -> np.ndarray:
        """Noise of the losses at an optimum, `(T,)`, in nats; NaN where it is not needed or not known.

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
        slopes = self._slopes_at(w, needed)
        of_rows = self._validation.loss_variance(w, self._validation_sizes, needed, self._anchors)
        return np.sqrt(variance + slopes**2 * of_rows)

    def _moves(self, w: np.ndarray, l2: float, mixture: np.ndarray) -> np.ndarray:
        """Draws of dw, `(pairs, k)`; a single one where it is zero, or not known."""
        tasks = np.flatnonzero(mixture)
        counts = self._problem.counts
        missing = 1 - counts / self._sizes
        is_sampled = missing[tasks] > 0
        if not is_sampled.any():
            return np.zeros((1, len(w)))
        if (counts[tasks][is_sampled] == 1).any():
            return np.full((1, len(w)), np.nan)
        total = float(mixture @ self._problem.totals)
        hessian, parts = 2 * l2 * np.eye(len(w)), []
        for task in tasks:
            x, margin, weight = self._problem.some_rows(task, max(2, _ROWS // len(tasks)))
            share = mixture[task] / total
            wrong = 1 / (1 + np.exp(margin + x @ w))
            curvature = (share * weight * wrong * (1 - wrong)).astype(x.dtype)
            hessian += (x.T * (curvature * (counts[task] / len(x)))) @ x
            if missing[task] > 0:
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
