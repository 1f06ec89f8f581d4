"""Calibrates the surrogate's losses by observed fine-tunings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

# Keeps logarithms of losses finite.
_MIN_LOSS = 1e-12
# Longer moves, to less than a thousandth of the loss, are clipped: only their direction is informative.
_MAX_MOVE = np.log(1e3)
# Strength of shrinkage to the common factor, in units of a run that moves a task as far as training on all tasks moves
# the median task. It decreases with the squared number of distinct runs, which separate noise from a task's response.
_SHRINKAGE = 1.0
# Bounds of each factor: orders are never reversed, and no correction is extreme.
_BOUNDS = (0.25, 4.0)
_CURVATURES = np.arange(0.0, 4.01, 0.25)


@dataclass(frozen=True)
class LossCalibration:
    """A monotone map from the surrogate's loss of a task to the loss that training reaches.

    The surrogate has one constant c for all tasks and one margin per answer, but some tasks soon reach their
    irreducible loss, and short trainings move faster than long ones. With the surrogate's move f = log(base / loss) of
    a task and its unit u,

        calibrated loss = base * exp(-factor * f * (1 + curvature) / (1 + curvature * |f| / u))

    times `level`. Losses that rise (f < 0) take the common factor. The order of subsets by the loss of one task is
    preserved.

    Args:
        base (`np.ndarray` of shape `(T,)`): losses at the linearization point.
        unit (`np.ndarray` of shape `(T,)`):
            Move at which the curvature has no effect: the move by training on all tasks, at least half of its median.
        factor (`np.ndarray` of shape `(T,)`): each task's own factor, for losses that fall.
        common (`float`): common factor of all tasks.
        curvature (`float`): how much further than in proportion short trainings move.
        level (`np.ndarray` of shape `(T,)` or `float`, *optional*, defaults to 1.0):
            Ratio of the loss of all validation rows to that of the captured ones, in the observed runs.
    """

    base: np.ndarray
    unit: np.ndarray
    factor: np.ndarray
    common: float
    curvature: float
    level: np.ndarray | float = 1.0

    @classmethod
    def fit(
        cls, base: np.ndarray, all_tasks: np.ndarray, predicted: np.ndarray, true: np.ndarray
    ) -> tuple["LossCalibration", np.ndarray]:
        """Fit to runs with known losses.

        Factors are ridge regressions of a task's true moves on the predicted ones, shrunk towards the common factor,
        which is slightly shrunk towards one. The curvature minimizes the mean error of the log-losses; fitting it takes
        two distinct runs.

        Args:
            base (`np.ndarray` of shape `(T,)`): losses at the linearization point.
            all_tasks (`np.ndarray` of shape `(T,)`): the surrogate's losses after training on all tasks.
            predicted (`np.ndarray` of shape `(R, T)`): the surrogate's losses of the runs.
            true (`np.ndarray` of shape `(R, T)`): observed losses; NaN where unknown.

        Returns:
            `tuple[LossCalibration, np.ndarray]`: the calibration, and the leave-one-out prediction of each known loss,
            `(R, T)`. The factors are fitted without the loss, c and the curvature with it.
        """
        base = np.maximum(base, _MIN_LOSS)
        known = np.isfinite(true)
        truly = np.where(known, _short_move(base, np.where(known, true, base)), 0.0)
        surrogate = _short_move(base, predicted)
        moved = np.abs(_short_move(base, all_tasks))
        median = max(float(np.median(moved)), _MIN_LOSS)
        # A task that training on all tasks does not move has no unit of its own.
        unit = np.maximum(moved, median / 2)
        runs = len(np.unique(surrogate[known.any(axis=1)].round(9), axis=0))
        weight = _SHRINKAGE * (median / runs) ** 2
        # No task gets more influence on the common factor than one with the median move.
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
        """Calibrated losses from the surrogate's losses, `(..., T)`."""
        move = _move(self.base, loss)
        return self.level * self.base * np.exp(-self._factors(move) * _bent(move, self.unit, self.curvature))

    def slope(self, loss: np.ndarray) -> np.ndarray:
        """Derivatives of the calibrated losses with respect to the surrogate's, `(..., T)`."""
        move = _move(self.base, loss)
        bend = (1 + self.curvature) / (1 + self.curvature * np.abs(move) / self.unit) ** 2
        return self(loss) * self._factors(move) * bend / np.maximum(loss, _MIN_LOSS)

    def of_all_rows(self, captured: np.ndarray, true: np.ndarray) -> "LossCalibration":
        """The same with the level of runs' losses over all validation rows, by a ratio estimate (Cochran 1977, 6.2).

        Args:
            captured (`np.ndarray` of shape `(R, T)`): observed losses of the captured rows; NaN where unknown.
            true (`np.ndarray` of shape `(R, T)`): those of all rows.
        """
        known = np.isfinite(captured) & np.isfinite(true)
        sums = [np.where(known, losses, 0.0).sum(axis=0) for losses in (true, captured)]
        return replace(self, level=np.where(sums[1] > 0, sums[0] / np.maximum(sums[1], _MIN_LOSS), 1.0))

    def around(self, base: np.ndarray) -> "LossCalibration":
        """The same for other validation rows, with these losses `(T,)` at the linearization point."""
        return replace(self, base=np.maximum(base, _MIN_LOSS))

    def of_tasks(self, tasks: np.ndarray) -> "LossCalibration":
        """The same for the tasks in a mask `(T,)` alone."""
        level = np.broadcast_to(self.level, self.base.shape)[tasks]
        return replace(self, base=self.base[tasks], unit=self.unit[tasks], factor=self.factor[tasks], level=level)

    def by_task(self, task_names: Sequence[str]) -> dict[str, Any]:
        """The calibration as JSON values."""
        factor = dict(zip(task_names, self.factor.tolist(), strict=True))
        values = {"curvature": self.curvature, "common_factor": self.common, "factor": factor}
        level = np.broadcast_to(self.level, len(task_names))
        return values if (level == 1).all() else {**values, "level": dict(zip(task_names, level.tolist()))}

    def _factors(self, move: np.ndarray) -> np.ndarray:
        return np.where(move > 0, self.factor, self.common)


def _move(base: np.ndarray, loss: np.ndarray) -> np.ndarray:
    return np.log(base / np.maximum(loss, _MIN_LOSS))


def _short_move(base: np.ndarray, loss: np.ndarray) -> np.ndarray:
    return np.clip(_move(base, loss), -_MAX_MOVE, _MAX_MOVE)


def _bent(move: np.ndarray, unit: np.ndarray, curvature: float) -> np.ndarray:
    return move * (1 + curvature) / (1 + curvature * np.abs(move) / unit)


def _ratio(product, square, weight, towards):
    """Slope of a ridge regression through the origin, shrunk towards another slope and clipped."""
    return np.clip((product + weight * towards) / (square + weight), *_BOUNDS)
