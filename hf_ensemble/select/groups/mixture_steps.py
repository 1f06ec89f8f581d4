"""Improvement of mixtures by the derivatives of the predicted loss."""

import numpy as np
from scipy.optimize import minimize

from ...estimate import SubsetEstimator

# Principal components that mixtures are improved in; whatever is chosen is predicted in all of them.
_NUM_COMPONENTS = 150
# Tasks with a smaller weight are dropped.
_MIN_WEIGHT = 1e-2


class MixtureSteps:
    """Improves mixtures for the tasks that they serve.

    Args:
        estimator (`SubsetEstimator`): makes the predictions.
        goal (`np.ndarray` of shape `(T,)`): weight of each task's loss.
        num_candidates (`int`): number of tasks, those with the steepest descent, whose weight a step may raise from 0.
        max_iterations (`int`): maximum number of L-BFGS-B iterations of a step.
    """

    def __init__(self, estimator: SubsetEstimator, goal: np.ndarray, num_candidates: int, max_iterations: int):
        self._estimator = estimator.truncated(_NUM_COMPONENTS)
        self._goal, self._num_candidates, self._max_iterations = goal, num_candidates, max_iterations
        self._row_cost = np.zeros(len(goal))
        if not estimator.has_fixed_steps:
            self._row_cost = estimator.training_cost(np.eye(len(goal)))
        self._known: dict[tuple[bytes, bytes, float, float], np.ndarray] = {}

    def improved(self, served: np.ndarray, start: np.ndarray, price: float, length: float) -> np.ndarray:
        """A mixture `(T,)` with less weighted loss of the tasks in the mask `served` `(T,)` plus price times cost."""
        key = (served.tobytes(), start.tobytes(), price, length)
        if key not in self._known:
            sensitivity = self._estimator.sensitivity(np.where(served, self._goal, 0.0), length)
            _, slope = sensitivity.to_weights(start)
            price *= length / self._estimator.length
            self._known[key] = self._descended(sensitivity, served, start, price, slope)
        return self._known[key]

    def alone(self, price: float) -> np.ndarray:
        """A mixture for each task whose loss counts, improved from the task alone, at most `(T, T)`."""
        tasks = np.eye(len(self._goal))
        slopes = self._estimator.single_task_slopes(self._goal)
        return np.stack(
            [
                self._descended(self._estimator.sensitivity(own * self._goal), own > 0, own, price, slope)
                for own, slope in zip(tasks, slopes)
                if own @ self._goal > 0
            ]
        )

    def _descended(
        self, sensitivity, served: np.ndarray, start: np.ndarray, price: float, slope: np.ndarray
    ) -> np.ndarray:
        row_cost = price * self._row_cost
        slope = slope + row_cost
        outside = np.flatnonzero((start == 0) & (slope < 0))
        upper = (start > 0).astype(float)
        upper[outside[np.argsort(slope[outside], kind="stable")[: self._num_candidates]]] = 1.0
        lower = np.zeros(len(start))
        # Only ratios of weights matter: one is fixed, the largest among the tasks that are served.
        fixed = int(np.argmax(np.where(served, start, -1.0)))
        lower[fixed] = upper[fixed] = 1.0
        moving = np.flatnonzero(upper)

        def value(own: np.ndarray) -> tuple[float, np.ndarray]:
            weights = np.zeros(len(start))
            weights[moving] = own
            loss, gradient = sensitivity.to_weights(weights, upper > 0)
            return loss + float(row_cost @ weights), (gradient + row_cost)[moving]

        found = minimize(
            value,
            np.clip(start, lower, upper)[moving],
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(lower[moving], upper[moving])),
            options={"maxiter": self._max_iterations, "ftol": 1e-6},
        )
        weights = np.zeros(len(start))
        weights[moving] = np.where(found.x < _MIN_WEIGHT, 0.0, found.x)
        return weights
