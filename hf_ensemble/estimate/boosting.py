"""A step of boosting in the linearised model: what the rows that an ensemble answers badly ask for.

The surrogate's rows get the margins m_i of the ensemble in place of those at theta0, so that a row's pull,
sigmoid(-m_i), and its curvature are LogitBoost's (Friedman, Hastie and Tibshirani 2000): rows that are answered well
count little. With u_i the weight of a row's loss,

    "surrogate":  w = argmin_w  sum_i u_i log(1 + exp(-(m_i + x_i.w))) / sum_i u_i + l2 |w|^2
    "ridge":      w = argmin_w  sum_i u_i (x_i.w - (1 - p_i))^2 / sum_i u_i + l2 |w|^2,    p_i = sigmoid(m_i)

The second is the residual fit of EnsembleLoRA (arXiv 2505.21930).
"""

from dataclasses import dataclass

import numpy as np

from .._settings import check_one_of
from ..errors import EstimationError
from ..store import Features
from .reduction import FeatureReduction
from .surrogate import SurrogateProblem

LINEAR_METHODS = ("surrogate", "ridge")


@dataclass(frozen=True)
class LinearStep:
    """A step w, in two forms that are the same: w = X^T a for the rows' captured features X.

    Args:
        coefficients (`np.ndarray` of shape `(d,)`): w, coefficients of the captured features.
        row_coefficients (`np.ndarray` of shape `(n,)`): a, one coefficient for each row.
    """

    coefficients: np.ndarray
    row_coefficients: np.ndarray


def linear_step(
    features: Features,
    margin: np.ndarray,
    l2: float,
    method: str = "surrogate",
    row_weights: np.ndarray | None = None,
    num_components: int = 400,
) -> LinearStep:
    """Solve for the step in the rows' principal components.

    Args:
        features (`np.ndarray` of shape `(n, d)`): captured features of the rows.
        margin (`np.ndarray` of shape `(n,)`): margins of the ensemble's answers.
        l2 (`float`): penalty of the coefficients of the captured features, see [`SubsetEstimator.penalty`].
        method (`str`, *optional*, defaults to `"surrogate"`): `"surrogate"` or `"ridge"`.
        row_weights (`np.ndarray` of shape `(n,)`, *optional*): weight u of each row's loss. 1 by default.
        num_components (`int`, *optional*, defaults to 400): number of principal components.

    Raises:
        `EstimationError`: for an unknown method, and for features and margins that are not finite.
    """
    check_one_of("method", method, LINEAR_METHODS, EstimationError)
    reduction = FeatureReduction.fit(features, num_components)
    reduced, own_l2 = reduction.apply(features), l2 / reduction.scale**2
    weights = np.ones(len(margin)) if row_weights is None else np.asarray(row_weights, dtype=np.float64)
    if method == "surrogate":
        problem = SurrogateProblem(reduced, margin, np.zeros(len(margin), dtype=int), row_weights=weights)
        w = problem.solve(np.ones((1, 1)), np.array([own_l2])).coefficients[0]
    else:
        if not np.isfinite(margin).all():
            raise EstimationError("Expected finite margins, found a value that is not finite.")
        w = _ridge(reduced.astype(np.float64), np.exp(-np.logaddexp(0.0, margin)), weights / weights.sum(), own_l2)
    # The components are those of these rows, so that X^T (X C / |X C|^2) = C, column by column.
    squares = np.square(reduced, dtype=np.float64).sum(0)
    kept = squares > squares.max() * 1e-12
    scaled = np.where(kept, w, 0.0) / np.where(kept, squares, 1.0) / reduction.scale**2
    return LinearStep(reduction.restore(w), reduced.astype(np.float64) @ scaled)


def _ridge(x: np.ndarray, residual: np.ndarray, shares: np.ndarray, l2: float) -> np.ndarray:
    weighted = x * shares[:, None]
    return np.linalg.solve(weighted.T @ x + l2 * np.eye(x.shape[1]), weighted.T @ residual)
