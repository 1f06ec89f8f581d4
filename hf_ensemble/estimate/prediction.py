"""`Prediction`: predicted outcomes of mixtures."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Prediction:
    """Predicted outcomes of `S` mixtures on `T` tasks.

    Args:
        task_names (`tuple[str, ...]`): task names.
        mixtures (`np.ndarray` of shape `(S, T)`): the predicted mixtures.
        loss (`np.ndarray` of shape `(S, T)`):
            Mean validation loss of each task, in nats per answer token; calibrated with observed runs, see
            [`LossCalibration`].
        accuracy (`np.ndarray` of shape `(S, T)`):
            Share of validation examples whose answer gets more than half of the probability, which is the accuracy for
            two labels.
        loss_low (`np.ndarray` of shape `(S, T)`):
            Lower ends of intervals for the true losses; NaN without observed runs, see [`IntervalWidth`].
        loss_high (`np.ndarray` of shape `(S, T)`): upper ends of the intervals.
        level (`float`):
            Coverage that the intervals promise: 0.9, or n / (n + 1) with n < 9 losses to fit them to. NaN without any.
        coefficients (`np.ndarray` of shape `(S, k)`): the surrogate's optimum.
        gradient_norm (`np.ndarray` of shape `(S,)`): norm of the surrogate's gradient at the optimum.
    """

    task_names: tuple[str, ...]
    mixtures: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    loss_low: np.ndarray
    loss_high: np.ndarray
    level: float
    coefficients: np.ndarray
    gradient_norm: np.ndarray
