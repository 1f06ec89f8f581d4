"""What an estimator says of mixtures."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Prediction:
    """Predicted outcomes of `S` mixtures on `T` tasks.

    Args:
        task_names (`tuple[str, ...]`): the tasks.
        mixtures (`np.ndarray` of shape `(S, T)`): what was asked for.
        loss (`np.ndarray` of shape `(S, T)`):
            Mean validation loss of each task, in nats per answer token; calibrated by runs where there are any, see
            [`LossCalibration`].
        accuracy (`np.ndarray` of shape `(S, T)`):
            Share of validation examples whose answer gets more than half of the probability; for two labels this is the
            accuracy.
        loss_low (`np.ndarray` of shape `(S, T)`):
            Lower ends of 90 % intervals for the true losses; NaN without a run that calibrates, see [`IntervalWidth`].
        loss_high (`np.ndarray` of shape `(S, T)`): their upper ends.
        coefficients (`np.ndarray` of shape `(S, k)`): the surrogate's optimum.
        gradient_norm (`np.ndarray` of shape `(S,)`): how exactly it was solved.
    """

    task_names: tuple[str, ...]
    mixtures: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    loss_low: np.ndarray
    loss_high: np.ndarray
    coefficients: np.ndarray
    gradient_norm: np.ndarray
