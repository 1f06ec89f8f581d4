"""A training replayed on the linearised model: how far the user's optimizer would go, without a fine-tuning."""

import numpy as np
from scipy.linalg import eigvalsh

from ..store import TrainingRecipe
from .training_length import batch_mean_square

# Smaller steps that a recipe's stretch is cut into; training that is not through by then goes to and fro at an optimum.
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
    """Where a training on the linearised model ends, `(k,)`.

    With G the mean gradient and Q the mean square norm of a batch's gradient, all in the preconditioner's coordinates,
    a step of plain gradient descent is -lr G; one of Adam, whose second moments follow the gradients as these shrink,
    is -lr sqrt(num_parameters / Q) G. The mean over batches is followed, not single batches, and where steps that are
    taken together would overshoot, in as many smaller ones.

    Args:
        features (`np.ndarray` of shape `(n, k)`): reduced training features.
        margin (`np.ndarray` of shape `(n,)`): margins at the linearisation point.
        weights (`np.ndarray` of shape `(n,)`): how often each row is drawn, relative to the others.
        squared_norms (`np.ndarray` of shape `(n,)`): of the captured features' rows.
        scale (`float`): what the captured features were divided by, see [`FeatureReduction`].
        recipe (`TrainingRecipe`): the training.
        row_weights (`np.ndarray` of shape `(n,)`, *optional*): weight of each row's loss in a batch; 1 by default.
    """
    row_weights = np.ones(len(weights)) if row_weights is None else row_weights
    share = weights * row_weights / (weights @ row_weights)
    # Of a row's part in a batch's mean gradient, relative to its share: 1 without weights.
    part = row_weights * weights.sum() / (weights @ row_weights)
    # The loss is nowhere more curved than this: a step of its inverse does not overshoot.
    curvature = float(eigvalsh(features.T @ (share[:, None] * features))[-1]) / 4
    w, z = np.zeros(features.shape[1]), margin.astype(np.float64)
    for left in recipe.learning_rates:
        for _ in range(_MAX_SUBSTEPS):
            residual = np.exp(-np.logaddexp(0.0, z))
            gradient = (share * residual) @ features
            speed = scale**2
            if recipe.num_parameters is not None:
                mean_square = scale**2 * (gradient @ gradient)
                single = (share * part * residual**2) @ squared_norms
                batch_square = batch_mean_square(mean_square, single, recipe.batch_size)
                speed *= np.sqrt(recipe.num_parameters / batch_square) if batch_square else 0.0
            step = min(left * speed, 1 / curvature)
            w += step * gradient
            z = margin + features @ w
            left -= step / speed if speed else left
            if left <= 1e-12:
                break
    return w
