"""The surrogate's penalty, from how far a training on each mixture moves relative to training on all tasks."""

import copy

import numpy as np

from ..store import TrainingRecipe
from ..tasks.sampling import epoch_length

# Share of the moves of A's entries under Adam that adds up along the relevant inputs; the rest oscillates. Measured on
# 15 real tasks, see docs/estimation.md.
_COHERENCE = 1 / 70
# Squared gradients of a mixture count as at least this share of those of all tasks: Adam goes nowhere where there is
# nothing but rounding.
_MIN_SQUARE = 1e-12


def batch_mean_square(mean_square: np.ndarray, squares: np.ndarray, batch_size: int) -> np.ndarray:
    """E |g|^2 for the mean gradient g of `batch_size` rows: |E g_i|^2 + (E |g_i|^2 - |E g_i|^2) / batch_size.

    Args:
        mean_square (`np.ndarray`): squared norm of the mean gradient, |E g_i|^2.
        squares (`np.ndarray` of the same shape): mean squared norm of a row's gradient, E |g_i|^2.
        batch_size (`int`): number of rows in a batch.
    """
    return mean_square + np.maximum(squares - mean_square, 0.0) / batch_size


class TrainingLength:
    """The penalty l2(a) of a mixture a, from the distance T(a) that a training moves per unit of gradient:

        l2(a) = c / E(all) * T(all) / T(a),    T(a) = E(a) / sqrt(Q(a)) * (1 + g E(a) / E(all))

    E is the length of an epoch, see [`epoch_length`]: with a fixed number of epochs, more rows take more steps. The
    distance of gradient descent on a linear model is proportional to the steps, and a penalty inverse to them gives an
    optimum at that distance. Q is the mean squared norm of a batch's gradient at the linearization point: Adam divides
    its steps by the root, so tasks with small gradients move as far as those with large ones. A batch's gradient is the
    mean over its rows weighted by their answer tokens, like a language model's loss. g is the gain of a fresh LoRA by
    its A, which starts to move once B has moved, so the adapter gets faster the longer it trains: the input gain times
    the sum of the learning rates times a measured constant. Q and g are left out for plain gradient descent and without
    a recipe, and E where all trainings take the same number of steps.

    Args:
        features (`np.ndarray` of shape `(n, k)`): reduced training features.
        squared_norms (`np.ndarray` of shape `(n,)`): squared row norms of the unreduced features, in the same units.
        margin (`np.ndarray` of shape `(n,)`): margins at the linearization point.
        task (`np.ndarray` of shape `(n,)`): index of each row's task; every task has rows.
        sampling_weights (`np.ndarray` of shape `(T,)`): weight of each task's rows in a training on all tasks.
        recipe (`TrainingRecipe`, *optional*): the training.
        row_weights (`np.ndarray` of shape `(n,)`, *optional*): weight of each row's loss in a batch. 1 by default.
        counts (`np.ndarray` of shape `(T,)`, *optional*):
            Number of rows of each task of which these are a sample; sums over a task's rows are scaled to them.
    """

    def __init__(
        self,
        features: np.ndarray,
        squared_norms: np.ndarray,
        margin: np.ndarray,
        task: np.ndarray,
        sampling_weights: np.ndarray,
        recipe: TrainingRecipe | None = None,
        row_weights: np.ndarray | None = None,
        counts: np.ndarray | None = None,
    ):
        given = np.bincount(task)
        self._counts = given if counts is None else counts
        per_row = self._counts / given
        row_weights = np.ones(len(task)) if row_weights is None else row_weights
        # Sum of row weights by task.
        self._totals = np.bincount(task, row_weights) * per_row
        self._fixed_steps = recipe is not None and recipe.fixed_steps
        self._batch_size = recipe.batch_size if recipe is not None and recipe.num_parameters is not None else None
        self._growth = 0.0
        if self._batch_size is not None:
            self._growth = _COHERENCE * recipe.input_gain * sum(recipe.learning_rates)
        residual = row_weights * np.exp(-np.logaddexp(0.0, np.asarray(margin, dtype=np.float64)))
        # Sums over each task's rows of the weighted loss gradients and of their squared norms.
        self._gradients = np.empty((len(self._counts), features.shape[1]))
        edges = np.concatenate([[0], np.cumsum(given)])
        is_sorted = not (np.diff(task) < 0).any()
        for index in range(len(self._counts)):
            own = slice(*edges[index : index + 2]) if is_sorted else task == index
            self._gradients[index] = residual[own] @ features[own] * per_row[index]
        self._squares = np.bincount(task, residual**2 * squared_norms) * per_row
        self._all = sampling_weights[None]
        self._all_rows = float(epoch_length(sampling_weights, self._counts))
        self._least_square = np.finfo(float).tiny
        if self._batch_size is not None:
            self._least_square = max(self._least_square, _MIN_SQUARE * float(self._batch_square(self._all)[0]))
        self._reference = float(self._distance(self._all)[0]) / self._all_rows

    def l2(self, scale: float | np.ndarray, mixtures: np.ndarray) -> np.ndarray:
        """Penalties `(S,)` of mixtures `(S, T)` for c = `scale`, a number or one per mixture."""
        # The solver refuses mixtures without rows; their penalty only has to be finite.
        mixtures = np.where((mixtures @ self._counts > 0)[:, None], mixtures, self._all)
        return scale * self._reference / self._distance(mixtures)

    def l2_with_gradient(self, scale: float, mixture: np.ndarray) -> tuple[float, np.ndarray]:
        """Penalty of a mixture `(T,)` of weights up to one, and its gradient `(T,)`.

        An epoch is taken to have sum_k a_k n_k rows, which is exact if the largest weight is one. For smaller weights
        the training is proportionally shorter, which keeps the penalty smooth where the largest weight is tied.
        """
        counts = self._counts
        rows = mixture @ counts
        l2 = scale * self._reference / self._distance(mixture[None], 1.0)[0]
        log_slope = np.zeros(len(counts))
        if not self._fixed_steps:
            growth = self._growth / self._all_rows
            log_slope -= counts / rows + growth * counts / (1 + growth * rows)
        if self._batch_size is not None:
            log_slope += self._batch_slope(mixture)
        return l2, l2 * log_slope

    def _batch_slope(self, mixture: np.ndarray) -> np.ndarray:
        """Derivative of log sqrt(Q) at a mixture `(T,)`."""
        if self._batch_square(mixture[None])[0] <= self._least_square:
            return np.zeros(len(mixture))
        gradient, squares = (values[0] for values in self._batch_gradients(mixture[None]))
        mean_square, total = gradient @ gradient, mixture @ self._totals
        mean_slope = 2 * (self._gradients @ gradient - mean_square * self._totals) / total
        squares_slope = squares * (self._squares / (mixture @ self._squares) + self._counts / (mixture @ self._counts))
        squares_slope -= 2 * squares * self._totals / total
        # Without noise, at identical gradients, the noise term is at its lower bound.
        noise_slope = (squares_slope - mean_slope) / self._batch_size if squares > mean_square else 0.0
        return (mean_slope + noise_slope) / (2 * batch_mean_square(mean_square, squares, self._batch_size))

    def truncated(self, num_components: int) -> "TrainingLength":
        """The same lengths from gradients in their first components."""
        other = copy.copy(self)
        other._gradients = self._gradients[:, :num_components]
        return other

    def task_gradients(self) -> np.ndarray:
        """Mean negative loss gradient of each task's rows, `(T, k)`, towards larger margins."""
        return self._gradients / self._totals[:, None]

    def _batch_gradients(self, mixtures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean gradient `(S, k)` of mixtures `(S, T)`, and the mean squared norm of a row's part in it `(S,)`."""
        totals = mixtures @ self._totals
        squares = (mixtures @ self._squares) * (mixtures @ self._counts) / totals**2
        return mixtures @ self._gradients / totals[:, None], squares

    def _batch_square(self, mixtures: np.ndarray) -> np.ndarray:
        """Q of each mixture, `(S,)`."""
        gradients, squares = self._batch_gradients(mixtures)
        return batch_mean_square(np.square(gradients).sum(axis=1), squares, self._batch_size)

    def _distance(self, mixtures: np.ndarray, heaviest: float | None = None) -> np.ndarray:
        """T of each mixture, `(S,)`, in arbitrary units; rows with weight `heaviest` are sampled once per epoch."""
        rows = mixtures @ self._counts
        if self._fixed_steps:
            steps = np.ones(len(mixtures))
        else:
            steps = rows / (mixtures.max(axis=1) if heaviest is None else heaviest)
            steps = steps * (1 + self._growth * steps / self._all_rows)
        if self._batch_size is None:
            return steps
        return steps / np.sqrt(np.maximum(self._batch_square(mixtures), self._least_square))
