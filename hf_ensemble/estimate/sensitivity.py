"""Derivatives of predicted losses with respect to what is sampled.

By the implicit function theorem at the surrogate's optimum, with its Hessian H and the loss L,

    dL / d a_k = -(dL / dw) H^-1 (d^2 F / dw d a_k)
"""

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from ..errors import EstimationError
from .calibration import LossCalibration
from .surrogate import SurrogateProblem
from .training_length import TrainingLength
from .validation_rows import ValidationRows

# Gradient norm for derivatives with respect to the mixture, which are more sensitive than the losses.
_TIGHT = 1e-10


class LossSensitivity:
    """The weighted predicted loss of targets as a function of the sampling weights.

    Each optimum is searched from the previous one: a sequence of similar weights is fast.

    Args:
        problem (`SurrogateProblem`): training rows.
        length (`TrainingLength`): penalty of each mixture.
        l2_scale (`float`): its constant.
        row_weights (`np.ndarray` of shape `(n,)`): weight of each training row's loss in a batch.
        validation (`ValidationRows`): rows whose loss is predicted.
        calibration (`LossCalibration`, *optional*): of these losses.
        targets (`np.ndarray` of shape `(T,)`): weight of each task's predicted loss in the sum.
    """

    def __init__(
        self,
        problem: SurrogateProblem,
        length: TrainingLength,
        l2_scale: float,
        row_weights: np.ndarray,
        validation: ValidationRows,
        calibration: LossCalibration | None,
        targets: np.ndarray,
    ):
        self._problem, self._length, self._l2_scale = problem, length, l2_scale
        # Rows of other tasks have no part in the loss.
        self._row_weights, self._validation = row_weights, validation.of_tasks(targets != 0)
        self._calibration, self._targets = calibration, targets
        self._last: np.ndarray | None = None

    def to_weights(self, weights: np.ndarray, tasks: np.ndarray | None = None) -> tuple[float, np.ndarray]:
        """Loss at weights `(T,)`, and its derivatives `(T,)`; see [`SubsetEstimator.weighted_loss`].

        With a mask `tasks` `(T,)`, which holds all tasks with a weight, the derivatives of the others are meaningless.
        This saves most of the time where few tasks have a weight.
        """
        weights = self._checked(weights)
        l2, l2_slope = self._length.l2_with_gradient(self._l2_scale, weights)
        w, value, direction, gradients = self._at_optimum(weights, l2, tasks)
        totals = self._problem.totals
        mixed = (gradients + 2 * l2 * np.outer(totals, w)) / (weights @ totals) + 2 * np.outer(l2_slope, w)
        return value, -mixed @ direction

    def to_examples(self, weights: np.ndarray) -> np.ndarray:
        """Influence of each training row, `(n,)`; see [`SubsetEstimator.example_influence`]."""
        weights = self._checked(weights)
        l2, _ = self._length.l2_with_gradient(self._l2_scale, weights)
        w, _, direction, _ = self._at_optimum(weights, l2)
        slopes = self._problem.row_slopes(w, direction) + 2 * l2 * (w @ direction) * self._row_weights
        return slopes / (weights @ self._problem.totals)

    def _checked(self, weights: np.ndarray) -> np.ndarray:
        weights, size = np.asarray(weights, dtype=np.float64), len(self._problem.counts)
        if weights.shape != (size,) or not ((weights >= 0) & (weights <= 1)).all() or not weights.any():
            raise EstimationError(f"Expected {size} weights from 0 to 1, not all zero, found {weights}.")
        return weights

    def direction(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The optimum w `(k,)` of a training on weights `(T,)`, and H^-1 times the loss gradient there `(k,)`."""
        weights = self._checked(weights)
        l2, _ = self._length.l2_with_gradient(self._l2_scale, weights)
        w, _, direction, _ = self._at_optimum(weights, l2, weights > 0)
        return w, direction

    def _at_optimum(
        self, weights: np.ndarray, l2: float, tasks: np.ndarray | None = None
    ) -> tuple[np.ndarray, float, np.ndarray, np.ndarray]:
        """The optimum w, the loss there, H^-1 times its gradient, and the summed gradient of each of `tasks`."""
        w = self._problem.solve(weights[None], np.array([l2]), _TIGHT, initial=self._last).coefficients[0]
        self._last = w[None]
        loss, slopes = self._validation.losses_with_slopes(w)
        calibrated, slope = loss, np.ones_like(loss)
        if self._calibration is not None:
            calibrated, slope = self._calibration(loss), self._calibration.slope(loss)
        gradient = ((self._targets * slope)[self._validation.task] * slopes) @ self._validation.features
        hessian, gradients = self._problem.derivatives(weights, w, l2, tasks)
        return w, float(self._targets @ calibrated), cho_solve(cho_factor(hessian), gradient), gradients
