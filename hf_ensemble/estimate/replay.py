"""A training replayed on the linearised model: how far the user's optimizer would go, without a fine-tuning."""

import numpy as np

from ..store import TrainingRecipe

# Optimizer steps in a row are taken together so that no replay has more than these.
_MAX_STEPS = 200


def replayed_coefficients(
    features: np.ndarray,
    margin: np.ndarray,
    weights: np.ndarray,
    squared_norms: np.ndarray,
    scale: float,
    recipe: TrainingRecipe,
) -> np.ndarray:
    """Where a training on the linearised model ends, `(k,)`.

    With G the mean gradient and E the mean square norm of a batch's gradient, all in the preconditioner's coordinates,
    a step of plain gradient descent is -lr G; one of Adam, whose second moments follow the gradients as these shrink,
    is -lr sqrt(num_parameters / E) G. The mean over batches is followed, not single batches.

    Args:
        features (`np.ndarray` of shape `(n, k)`): reduced training features.
        margin (`np.ndarray` of shape `(n,)`): margins at the linearisation point.
        weights (`np.ndarray` of shape `(n,)`): how often each row is drawn, relative to the others.
        squared_norms (`np.ndarray` of shape `(n,)`): of the captured features' rows.
        scale (`float`): what the captured features were divided by, see [`FeatureReduction`].
        recipe (`TrainingRecipe`): the training.
    """
    share = weights / weights.sum()
    rates = np.asarray(recipe.learning_rates, dtype=np.float64)
    w, z = np.zeros(features.shape[1]), margin.astype(np.float64)
    for part in np.array_split(rates, min(_MAX_STEPS, len(rates))):
        residual = np.exp(-np.logaddexp(0.0, z))
        gradient = (share * residual) @ features
        step = part.sum() * scale**2
        if recipe.num_parameters is not None:
            mean_square = scale**2 * (gradient @ gradient)
            single = (share * residual**2) @ squared_norms
            batch_square = mean_square + max(single - mean_square, 0.0) / recipe.batch_size
            step *= np.sqrt(recipe.num_parameters / batch_square) if batch_square else 0.0
        w += step * gradient
        z = margin + features @ w
    return w
