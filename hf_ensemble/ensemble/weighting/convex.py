"""Minimising a smooth convex function of a few weights, with a bound on what is left to gain."""

from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize

CONSTRAINTS = ("simplex", "nonnegative", "unconstrained")
# Without bounds, the weights of adapters that separate the data would grow for ever.
MAX_WEIGHT = 10.0
_TOLERANCE = 1e-9

Objective = Callable[[np.ndarray], tuple[float, np.ndarray, np.ndarray]]


def bounds_of(constraint: str) -> tuple[float, float]:
    """Smallest and largest value of a single weight."""
    return {
        "simplex": (0.0, 1.0),
        "nonnegative": (0.0, MAX_WEIGHT),
        "unconstrained": (-MAX_WEIGHT, MAX_WEIGHT),
    }[constraint]


def minimize_convex(
    objective: Objective, start: np.ndarray, constraint: str, max_steps: int = 100, tolerance: float = _TOLERANCE
) -> tuple[np.ndarray, float, float]:
    """Newton's method with the constraint kept in every quadratic model and a line search, so no step ascends.

    Args:
        objective (`Callable`): value, gradient `(m,)` and Hessian `(m, m)` at a point.
        start (`np.ndarray` of shape `(m,)`): a feasible point.
        constraint (`str`): one of [`CONSTRAINTS`].
        max_steps (`int`): at most.
        tolerance (`float`): gap to stop at.

    Returns:
        `tuple`: the point, its value, and the gap: a bound, from convexity, on how far the value is above the
        optimum, max over feasible s of gradient . (point - s).
    """
    low, high = bounds_of(constraint)
    on_simplex = constraint == "simplex"
    point = start.astype(np.float64)
    value, gradient, hessian = objective(point)
    gap = _gap(point, gradient, low, high, on_simplex)
    for _ in range(max_steps):
        if gap <= tolerance:
            break
        target = _quadratic_minimum(point, gradient, hessian, low, high, on_simplex)
        if gradient @ (target - point) >= 0:
            target = _linear_minimum(gradient, low, high, on_simplex)
        step, slope = 1.0, gradient @ (target - point)
        while step > 1e-12:
            new = objective(point + step * (target - point))
            if new[0] <= value + 1e-4 * step * slope:
                break
            step /= 2
        else:
            break
        point = point + step * (target - point)
        value, gradient, hessian = new
        gap = _gap(point, gradient, low, high, on_simplex)
    return point, value, gap


def _linear_minimum(gradient, low, high, on_simplex) -> np.ndarray:
    if on_simplex:
        return np.eye(len(gradient))[int(np.argmin(gradient))]
    return np.where(gradient > 0, low, high)


def _gap(point, gradient, low, high, on_simplex) -> float:
    return float(gradient @ (point - _linear_minimum(gradient, low, high, on_simplex)))


def _quadratic_minimum(point, gradient, hessian, low, high, on_simplex) -> np.ndarray:
    """Feasible minimum of the quadratic model, by an active set: bounds are held while they push outwards."""
    size = len(point)
    hessian = hessian + np.eye(size) * (1e-12 + 1e-10 * np.trace(hessian) / size)

    def model(x):
        d = x - point
        return gradient @ d + 0.5 * d @ hessian @ d, gradient + hessian @ d

    # The gradient is scaled to one, so that the tolerance of the solver means the same everywhere.
    scale = max(float(np.abs(gradient).max()), 1e-12)
    result = minimize(
        lambda x: tuple(v / scale for v in model(x)),
        point,
        jac=True,
        bounds=[(low, high)] * size,
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1.0, "jac": lambda x: np.ones(size)}
        if on_simplex
        else (),
        method="SLSQP",
        options={"maxiter": 200, "ftol": 1e-15},
    )
    return _polished(np.clip(result.x, low, high), point, gradient, hessian, low, high, on_simplex)


def _polished(x, point, gradient, hessian, low, high, on_simplex) -> np.ndarray:
    """The model's exact minimum over the weights that are not at a bound, where that stays feasible."""
    free = (x > low + 1e-7) & (x < high - 1e-7)
    fixed = np.where(x <= low + 1e-7, low, high)
    x = np.where(free, x, fixed)
    count = int(free.sum())
    if count:
        right = -(gradient + hessian @ (np.where(free, 0.0, x) - point))[free]
        system = hessian[np.ix_(free, free)]
        if on_simplex:
            system = np.block([[system, np.ones((count, 1))], [np.ones((1, count)), np.zeros((1, 1))]])
            right = np.append(right, 1.0 - x[~free].sum())
        inner = np.linalg.lstsq(system, right, rcond=None)[0][:count]
        if (inner >= low).all() and (inner <= high).all():
            x = x.copy()
            x[free] = inner
    if on_simplex:
        x = x / x.sum()
    return x
