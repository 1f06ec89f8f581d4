"""How far each task's loss really moves, next to how far the surrogate moves it: learned from true fine-tunings."""

from dataclasses import dataclass

import numpy as np

# Losses of nothing have no logarithm.
_LEAST_LOSS = 1e-12
# What the tasks have in common counts as much as a run that moves a task by the root of this, in median moves.
_SHRINKAGE = 0.2
# A task's own factor, and the common one next to 1, lie in these bounds: an order is never turned around.
_BOUNDS = (0.25, 4.0)
_CURVATURES = np.arange(0.0, 4.01, 0.25)


@dataclass(frozen=True)
class LossCalibration:
    """A monotone map from the surrogate's loss of a task to the loss that training reaches.

    A margin stands for a whole answer, and one c for all tasks; but some tasks soon come to what cannot be known, and
    short trainings move faster than long ones. With f = log(base / loss) the surrogate's move of a task and u its unit,

        calibrated loss = base * exp(-factor * f * (1 + curvature) / (1 + curvature * |f| / u))

    The order of subsets by one task's loss stays as it was.

    Args:
        base (`np.ndarray` of shape `(T,)`): losses at the linearisation point.
        unit (`np.ndarray` of shape `(T,)`): move at which the curvature does nothing, that of training on all tasks.
        factor (`np.ndarray` of shape `(T,)`): each task's own.
        curvature (`float`): how much further than in proportion short trainings go.
    """

    base: np.ndarray
    unit: np.ndarray
    factor: np.ndarray
    curvature: float

    @classmethod
    def fit(
        cls, base: np.ndarray, all_tasks: np.ndarray, predicted: np.ndarray, true: np.ndarray
    ) -> tuple["LossCalibration", np.ndarray]:
        """From runs whose losses are known.

        Factors are ridge regressions of a task's true moves on the predicted ones, drawn to what the tasks have in
        common. The curvature is the one with the least mean error of the logarithms; one run does not tell it.

        Args:
            base (`np.ndarray` of shape `(T,)`): losses at the linearisation point.
            all_tasks (`np.ndarray` of shape `(T,)`): the surrogate's losses of a training on all tasks.
            predicted (`np.ndarray` of shape `(R, T)`): the surrogate's losses of the runs.
            true (`np.ndarray` of shape `(R, T)`): theirs; NaN where not known.

        Returns:
            `tuple[LossCalibration, np.ndarray]`: the calibration, and for each of the known losses the calibrated one
            without it, `(R, T)`.
        """
        moved = np.abs(_move(base, all_tasks))
        # A task that all tasks together leave in its place has no unit of its own.
        unit = np.maximum(moved, max(np.median(moved) / 2, _LEAST_LOSS))
        known = np.isfinite(true)
        truly = _move(base, np.where(known, true, base))
        weight = _SHRINKAGE * np.median(unit) ** 2
        fits = []
        for curvature in _CURVATURES if len(true) > 1 else _CURVATURES[:1]:
            moves = np.where(known, _bent(_move(base, predicted), unit, curvature), 0.0)
            product, square = moves * truly, moves**2
            common = np.clip(product.sum() / max(square.sum(), _LEAST_LOSS), *_BOUNDS)

            def factors(products: np.ndarray, squares: np.ndarray, common: float = common) -> np.ndarray:
                own = (products + weight * common) / (squares + weight)
                return np.clip(own, common * _BOUNDS[0], common * _BOUNDS[1])

            factor = factors(product.sum(axis=0), square.sum(axis=0))
            error = np.abs(truly - factor * moves)[known].mean()
            without = factors(product.sum(axis=0) - product, square.sum(axis=0) - square)
            fits.append((error, cls(base, unit, factor, float(curvature)), base * np.exp(-without * moves)))
        _, calibration, left_out = min(fits, key=lambda fit: fit[0])
        return calibration, left_out

    def __call__(self, loss: np.ndarray) -> np.ndarray:
        """Calibrated losses from the surrogate's, `(..., T)`."""
        return self.base * np.exp(-self.factor * _bent(_move(self.base, loss), self.unit, self.curvature))

    def slope(self, loss: np.ndarray) -> np.ndarray:
        """Derivatives of the calibrated losses by the surrogate's, `(..., T)`."""
        bend = (1 + self.curvature) / (1 + self.curvature * np.abs(_move(self.base, loss)) / self.unit) ** 2
        return self(loss) * self.factor * bend / np.maximum(loss, _LEAST_LOSS)


def _move(base: np.ndarray, loss: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(base, _LEAST_LOSS) / np.maximum(loss, _LEAST_LOSS))


def _bent(move: np.ndarray, unit: np.ndarray, curvature: float) -> np.ndarray:
    return move * (1 + curvature) / (1 + curvature * np.abs(move) / unit)
