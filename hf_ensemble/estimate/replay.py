"""A training replayed on the linearised model: how far the user's optimizer would go, without a fine-tuning."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import EstimationError

# Optimizer steps in a row are taken together so that no replay has more than these.
_MAX_STEPS = 200


@dataclass(frozen=True)
class TrainingRecipe:
    """What decides how far a training on all tasks goes.

    Args:
        learning_rates (`Sequence[float]`): of every optimizer step, in order.
        batch_size (`int`): rows of an optimizer step, over all devices.
        num_parameters (`float`, *optional*):
            Of Adam and its kin: how many parameters take full steps, see [`Preconditioner.num_moving`]. `None` for
            plain gradient descent.

    Raises:
        `EstimationError`: for a recipe without steps, or with values that are not positive.
    """

    learning_rates: Sequence[float]
    batch_size: int
    num_parameters: float | None = None

    def __post_init__(self):
        rates = np.asarray(self.learning_rates, dtype=np.float64)
        if rates.ndim != 1 or not len(rates) or not np.isfinite(rates).all() or (rates < 0).any() or not rates.any():
            raise EstimationError("A recipe needs the learning rate of every step, not negative and not all zero.")
        if self.batch_size < 1 or (self.num_parameters is not None and self.num_parameters <= 0):
            raise EstimationError(
                f"Expected a positive batch_size and num_parameters, found {self.batch_size}, {self.num_parameters}."
            )


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
