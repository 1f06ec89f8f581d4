"""Replays a training on the linearized model, to find how far the optimizer goes without a fine-tuning."""

from collections.abc import Iterator

import numpy as np
from scipy.linalg import eigvalsh

from ..store import TrainingRecipe, row_blocks
from .training_length import batch_mean_square

# Maximum number of features that are kept in float64; more are converted in blocks, again and again.
_KEPT = 8_000_000
# Maximum number of steps that a segment of the recipe is split into; any further steps oscillate around an optimum.
_MAX_SUBSTEPS = 100


def replayed_coefficients(
    features: np.ndarray,
    margin: np.ndarray,
    weights: np.ndarray,
    squared_norms: np.ndarray,
    scale: float,
    recipe: TrainingRecipe,
    row_weights: np.ndarray | None = None,
) -> np.ndarray:
    """Final coefficients `(k,)` of a training on the linearized model.

    With the mean gradient G and the mean squared norm Q of a batch's gradient, both in the preconditioner's
    coordinates, a step of plain gradient descent is -lr G, and a step of Adam, whose second moments follow the
    gradients as they shrink, is -lr sqrt(num_parameters / Q) G. The replay follows the mean over batches instead of
    single batches. A segment whose combined steps would overshoot is split into smaller steps.

    Args:
        features (`np.ndarray` of shape `(n, k)`): reduced training features, in any precision.
        margin (`np.ndarray` of shape `(n,)`): margins at the linearization point.
        weights (`np.ndarray` of shape `(n,)`): relative sampling weight of each row.
        squared_norms (`np.ndarray` of shape `(n,)`): squared row norms of the captured features.
        scale (`float`): divisor of the captured features, see [`FeatureReduction`].
        recipe (`TrainingRecipe`): the training.
        row_weights (`np.ndarray` of shape `(n,)`, *optional*): weight of each row's loss in a batch. 1 by default.
    """
    row_weights = np.ones(len(weights)) if row_weights is None else row_weights
    share = weights * row_weights / (weights @ row_weights)
    # A row's part in a batch's mean gradient, relative to its share; 1 without weights.
    part = row_weights * weights.sum() / (weights @ row_weights)
    # Upper bound of the loss's curvature: a step of its inverse does not overshoot.
    rows = _Rows(features)
    curvature = float(eigvalsh(rows.second_moment(share))[-1]) / 4
    w, z = np.zeros(features.shape[1]), margin.astype(np.float64)
    for left in recipe.learning_rates:
        for _ in range(_MAX_SUBSTEPS):
            residual = np.exp(-np.logaddexp(0.0, z))
            gradient = rows.sum(share * residual)
            speed = scale**2
            if recipe.num_parameters is not None:
                mean_square = scale**2 * (gradient @ gradient)
                single = (share * part * residual**2) @ squared_norms
                batch_square = batch_mean_square(mean_square, single, recipe.batch_size)
                speed *= np.sqrt(recipe.num_parameters / batch_square) if batch_square else 0.0
            step = min(left * speed, 1 / curvature)
            w += step * gradient
            z = margin + rows.moves(w)
            left -= step / speed if speed else left
            if left <= 1e-12:
                break
    return w


class _Rows:
    """Products with features `(n, k)` in float64, without a copy of many of them."""

    def __init__(self, features: np.ndarray):
        self._features = features.astype(np.float64) if features.size <= _KEPT else features

    def _blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        for part, block in row_blocks(self._features, _KEPT):
            yield part, block.astype(np.float64, copy=False)

    def second_moment(self, weights: np.ndarray) -> np.ndarray:
        """X^T diag(weights) X, `(k, k)`."""
        return sum(block.T @ (weights[part, None] * block) for part, block in self._blocks())

    def sum(self, weights: np.ndarray) -> np.ndarray:
        """Weighted sum of the rows, `(k,)`."""
        return sum(weights[part] @ block for part, block in self._blocks())

    def moves(self, w: np.ndarray) -> np.ndarray:
        """X w, `(n,)`."""
        return np.concatenate([block @ w for _, block in self._blocks()])
