"""`Prediction`: predicted outcomes of mixtures."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

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
        displacement (`np.ndarray` of shape `(S, T)`): root mean square of x.w over the validation examples.
        level (`float`):
            Coverage that the intervals promise: 0.9, or n / (n + 1) with n < 9 losses to fit them to. NaN without any.
        coefficients (`np.ndarray` of shape `(S, k)`): the surrogate's optimum.
        gradient_norm (`np.ndarray` of shape `(S,)`): norm of the surrogate's gradient at the optimum.
        l2_scale (`np.ndarray` of shape `(S,)`): the constant c of each mixture's penalty.
        ends (`Callable`): both ends of the intervals of some predictions, given these predictions alone.

    Attributes:
        loss_low (`np.ndarray` of shape `(S, T)`):
            Lower ends of intervals for the true losses; NaN without observed runs, see [`IntervalWidth`].
        loss_high (`np.ndarray` of shape `(S, T)`): upper ends of the intervals.
    """

    task_names: tuple[str, ...]
    mixtures: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    displacement: np.ndarray
    level: float
    coefficients: np.ndarray
    gradient_norm: np.ndarray
    l2_scale: np.ndarray
    ends: Callable[["Prediction"], tuple[np.ndarray, np.ndarray]] = field(repr=False, compare=False)

    @cached_property
    def loss_low(self) -> np.ndarray:
        return self._interval[0]

    @cached_property
    def loss_high(self) -> np.ndarray:
        return self._interval[1]

    @cached_property
    def _interval(self) -> tuple[np.ndarray, np.ndarray]:
        return self.ends(self)

    def at(self, row: int) -> "Prediction":
        """The prediction of a single mixture, whose interval is found without those of the others."""
        rows = slice(row, row + 1)
        names = ("mixtures", "loss", "accuracy", "displacement", "coefficients", "gradient_norm", "l2_scale")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})
