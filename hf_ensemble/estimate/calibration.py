"""How far each task's loss really moves, next to how far the surrogate moves it: learned from true fine-tunings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Losses of nothing have no logarithm.
_LEAST_LOSS = 1e-12
# From moves beyond this, a loss a thousandth of what it was, nothing is learned but their direction.
_LONGEST_MOVE = np.log(1e3)
# What the tasks have in common counts as much as a run that moves a task as far as all tasks together move the median
# one; less so by the square of the number of different runs, which tell noise from what is a task's own.
_SHRINKAGE = 1.0
# Of each factor: an order is never turned around, and little is made of much or much of little.
_BOUNDS = (0.25, 4.0)
_CURVATURES = np.arange(0.0, 4.01, 0.25)


@dataclass(frozen=True)
class LossCalibration:
    """A monotone map from the surrogate's loss of a task to the loss that training reaches.

    A margin stands for a whole answer, and one c for all tasks; but some tasks soon come to what cannot be known, and
    short trainings move faster than long ones. With f = log(base / loss) the surrogate's move of a task and u its unit,

        calibrated loss = base * exp(-factor * f * (1 + curvature) / (1 + curvature * |f| / u))

    Losses that rise (f < 0) take the common factor. The order of subsets by one task's loss stays as it was.

    Args:
        base (`np.ndarray` of shape `(T,)`): losses at the linearisation point.
        unit (`np.ndarray` of shape `(T,)`):
            Move at which the curvature does nothing: that of training on all tasks, at least half the median of these.
        factor (`np.ndarray` of shape `(T,)`): each task's own, where its loss falls.
        common (`float`): the tasks' common factor.
        curvature (`float`): how much further than in proportion short trainings go.
    """

    base: np.ndarray
    unit: np.ndarray
    factor: np.ndarray
    common: float
    curvature: float

    @classmethod
    def fit(
        cls, base: np.ndarray, all_tasks: np.ndarray, predicted: np.ndarray, true: np.ndarray
    ) -> tuple["LossCalibration", np.ndarray]:
        """From runs whose losses are known.

        Factors are ridge regressions of a task's true moves on the predicted ones, drawn to what the tasks have in
        common, and that a little to one. The curvature is the one with the least mean error of the logarithms; it takes
        two different runs to tell it.

        Args:
            base (`np.ndarray` of shape `(T,)`): losses at the linearisation point.
            all_tasks (`np.ndarray` of shape `(T,)`): the surrogate's losses of a training on all tasks.
            predicted (`np.ndarray` of shape `(R, T)`): the surrogate's losses of the runs.
            true (`np.ndarray` of shape `(R, T)`): theirs; NaN where not known.

        Returns:
            `tuple[LossCalibration, np.ndarray]`: the calibration, and for each of the known losses the calibrated one
            by factors without it, `(R, T)`; c and the curvature have seen it.
        """
        base = np.maximum(base, _LEAST_LOSS)
        known = np.isfinite(true)
        truly = np.where(known, _short_move(base, np.where(known, true, base)), 0.0)
        surrogate = _short_move(base, predicted)
        moved = np.abs(_short_move(base, all_tasks))
        median = max(float(np.median(moved)), _LEAST_LOSS)
        # A task that all tasks together leave in its place has no unit of its own.
        unit = np.maximum(moved, median / 2)
        runs = len(np.unique(surrogate[known.any(axis=1)].round(9), axis=0))
        weight = _SHRINKAGE * (median / runs) ** 2
        # No task says more about all than one that moves as far as the median.
        share, falls = 1 / np.maximum(unit, median) ** 2, surrogate > 0
        fits = []
        for curvature in _CURVATURES if runs > 1 else _CURVATURES[:1]:
            moves = np.where(known, _bent(surrogate, unit, curvature), 0.0)
            product, square = moves * truly, moves**2
            shared = product * share, square * share
            common = _ratio(shared[0].sum(), shared[1].sum(), 1.0, 1.0)
            own = np.where(falls, product, 0.0), np.where(falls, square, 0.0)
            factor = _ratio(own[0].sum(axis=0), own[1].sum(axis=0), weight, common)
            error = np.abs(truly - np.where(falls, factor, common) * moves)[known].mean()
            others = _ratio(*(part.sum() - part for part in shared), 1.0, 1.0)
            without = _ratio(*(part.sum(axis=0) - part for part in own), weight, others)
            left_out = base * np.exp(-np.where(falls, without, others) * moves)
            fits.append((error, cls(base, unit, factor, float(common), float(curvature)), left_out))
        _, calibration, left_out = min(fits, key=lambda fit: fit[0])
        return calibration, left_out

    def __call__(self, loss: np.ndarray) -> np.ndarray:
        """Calibrated losses from the surrogate's, `(..., T)`."""
        move = _move(self.base, loss)
        return self.base * np.exp(-self._factors(move) * _bent(move, self.unit, self.curvature))

    def slope(self, loss: np.ndarray) -> np.ndarray:
        """Derivatives of the calibrated losses by the surrogate's, `(..., T)`."""
        move = _move(self.base, loss)
        bend = (1 + self.curvature) / (1 + self.curvature * np.abs(move) / self.unit) ** 2
        return self(loss) * self._factors(move) * bend / np.maximum(loss, _LEAST_LOSS)

    def by_task(self, task_names: Sequence[str]) -> dict[str, Any]:
        """What was learned, as values that JSON can hold."""
        factor = dict(zip(task_names, self.factor.tolist(), strict=True))
        return {"curvature": self.curvature, "common_factor": self.common, "factor": factor}

    def _factors(self, move: np.ndarray) -> np.ndarray:
        return np.where(move > 0, self.factor, self.common)


def _move(base: np.ndarray, loss: np.ndarray) -> np.ndarray:
    return np.log(base / np.maximum(loss, _LEAST_LOSS))


def _short_move(base: np.ndarray, loss: np.ndarray) -> np.ndarray:
    return np.clip(_move(base, loss), -_LONGEST_MOVE, _LONGEST_MOVE)


def _bent(move: np.ndarray, unit: np.ndarray, curvature: float) -> np.ndarray:
    return move * (1 + curvature) / (1 + curvature * np.abs(move) / unit)


def _ratio(product, square, weight, towards):
    """Slope of a ridge regression through the origin that is drawn to another slope, within bounds."""
    return np.clip((product + weight * towards) / (square + weight), *_BOUNDS)
