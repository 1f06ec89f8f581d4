"""Trainings on mixtures of tasks, linearized where their gradients were captured."""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .._settings import check_at_least, check_device, check_number, checked_mapping
from ..errors import EstimationError
from ..store import FeatureTable, TrainingRecipe
from ..tasks.sampling import epoch_length
from .mixtures import loss_weights, mixture_weights
from .reduction import FeatureReduction, squared_row_norms
from .replay import replayed_coefficients
from .surrogate import SurrogateProblem, SurrogateSolution
from .training_length import TrainingLength

# Rows that principal components are computed from where there are many more: a pass over all of them takes long.
_COMPONENT_ROWS = 20_000
# Rows that trainings of several lengths are replayed on, to compare them.
_REPLAYED_ROWS = 20_000


class LinearizedTraining:
    """Where a training on any mixture of tasks ends, and what it costs, in the principal components of its gradients.

    Args:
        train (`FeatureTable`): features of the training rows.
        num_components (`int`): number of principal components for the surrogate.
        sampling_weights (`dict[str, float]`): sampling weight of each task's rows, 1 where it is absent.
        recipe (`TrainingRecipe`, *optional*): the training, which determines how l2 depends on the mixture.
        device (`torch.device` or `str`, *optional*): device for principal components and surrogates.
        task_loss_weighting (`str`): what the training averages the loss of a step over, see [`loss_weights`].
        length (`float`): length of the trainings, in multiples of the recipe's.
        other_lengths (`Sequence[float]`): further lengths that trainings may have.
        replays (`bool`): whether the recipe's training on all tasks is replayed.

    Raises:
        `EstimationError`: for tasks without rows, features that are not finite, and values out of range.
        `ConfigurationError`: for a device that is not there, or has no float64.

    Attributes:
        counts (`np.ndarray` of shape `(T,)`): number of training rows, of all where the captured ones are a sample.
        token_counts (`np.ndarray` of shape `(T,)`, *optional*): answer tokens of all rows, where they are known.
        sampling_weights (`np.ndarray` of shape `(T,)`): sampling weight of each task's rows.
        lengths (`tuple[float, ...]`): of trainings that can be predicted; the first is the estimator's own.
        training_ids (`tuple[tuple[str, str]]`): task and example id of each captured row.
    """

    def __init__(
        self,
        train: FeatureTable,
        num_components: int,
        sampling_weights: Mapping[str, float],
        recipe: TrainingRecipe | None,
        device: torch.device | str | None,
        task_loss_weighting: str,
        length: float,
        other_lengths: Sequence[float],
        replays: bool,
    ):
        check_at_least("num_components", num_components, 1)
        if recipe is not None and not isinstance(recipe, TrainingRecipe):
            raise EstimationError(f"Expected recipe to be a TrainingRecipe, found {recipe!r:.60}.")
        for name, weight in checked_mapping("sampling_weights", sampling_weights, EstimationError).items():
            check_number(f"The sampling weight of {name!r}", weight, 0, above=True, error=EstimationError)
        check_number("length", length, 0, above=True, error=EstimationError)
        length = float(length)
        self.lengths = (length, *_checked_lengths(other_lengths, length, recipe))
        check_device("device", device)
        check_rows(train, "training")
        names = self.task_names = train.task_names
        self.counts = train.sizes
        self.token_counts = None
        if train.num_tokens is not None:
            tokens = np.bincount(train.task, train.num_tokens, len(names)) * train.rows_per_captured
            self.token_counts = np.rint(tokens).astype(int)
        self.sampling_weights = mixture_weights({**dict.fromkeys(names, 1.0), **sampling_weights}, names)
        self.length = length
        # Whether optima are those of float32.
        self._is_rough = False
        whole, recipe = recipe, None if recipe is None else recipe.of_length(length)
        self._recipe = recipe
        self.reduction = FeatureReduction.fit(train.features, num_components, device, _COMPONENT_ROWS)
        reduced = self.reduction.apply(train.features)
        self.training_ids = tuple(zip((names[index] for index in train.task), train.example_id.tolist()))
        self.task_loss_weighting = task_loss_weighting
        row_weights = loss_weights(train, task_loss_weighting, self.sampling_weights)
        # How many rows each captured one stands for, and the weight of their losses.
        self._per_row = train.rows_per_captured[train.task]
        self._row_weights = row_weights * self._per_row
        self._train = SurrogateProblem(reduced, train.margin, train.task, device, self._row_weights)
        squared_norms = squared_row_norms(train.features) if recipe is not None else np.zeros(len(train))
        self._length = TrainingLength(
            features=reduced,
            squared_norms=squared_norms / self.reduction.scale**2,
            margin=train.margin,
            task=train.task,
            sampling_weights=self.sampling_weights,
            recipe=recipe,
            row_weights=row_weights,
            counts=self.counts,
        )
        # Where the replayed training has ended; and those of several lengths, which are compared with each other.
        self._replayed: np.ndarray | None = None
        self._replayed_lengths: dict[float, np.ndarray] = {}
        if recipe is None:
            return
        drawn = self.sampling_weights[train.task] * self._per_row

        def replayed(length: float, rows: slice | np.ndarray) -> np.ndarray:
            arrays = (own[rows] for own in (reduced, train.margin, drawn, squared_norms))
            return replayed_coefficients(*arrays, self.reduction.scale, whole.of_length(length), row_weights[rows])

        if replays:
            self._replayed = replayed(length, slice(None))
        if len(self.lengths) > 1:
            # Tasks' rows lie together: each has its share.
            few = np.unique(np.linspace(0, len(train) - 1, min(len(train), _REPLAYED_ROWS)).round().astype(int))
            self._replayed_lengths = {own: replayed(own, few) for own in self.lengths}

    @property
    def has_fixed_steps(self) -> bool:
        """Whether a training takes the same number of steps whatever it is on."""
        return self._recipe is not None and self._recipe.fixed_steps

    def training_cost(self, mixtures: np.ndarray, lengths: np.ndarray | None = None) -> np.ndarray:
        """Cost of training on mixtures `(S, T)`: rows drawn, in multiples of a whole training on all tasks, `(S,)`.

        Their `lengths` `(S,)` are the estimator's own by default.
        """
        lengths = np.full(len(mixtures), self.length) if lengths is None else np.asarray(lengths)
        if self.has_fixed_steps:
            return lengths.astype(np.float64)
        everything = epoch_length(self.sampling_weights, self.counts)
        return lengths * epoch_length(mixtures * self.sampling_weights, self.counts) / everything

    def task_gradients(self) -> np.ndarray:
        """Mean negative loss gradient of each task's training rows at the linearization point, `(T, k)`."""
        return self._length.task_gradients()

    def parameters_at(self, coefficients: np.ndarray) -> np.ndarray:
        """Coefficients `(..., d)` of the captured features, as [`applied_update`] takes them."""
        return self.reduction.restore(coefficients)

    def truncated(self, num_components: int) -> "LinearizedTraining":
        """The same in its first principal components alone: less exact, and faster by about their share."""
        check_at_least("num_components", num_components, 1)
        other = copy.copy(self)
        other._train = self._train.truncated(num_components)
        other._length = self._length.truncated(num_components)
        return other

    def _penalties(self, mixtures: np.ndarray, l2_scale: float | np.ndarray) -> np.ndarray:
        """l2 of mixtures `(S, T)` for coefficients of the components, `(S,)`."""
        return self._length.l2(l2_scale, mixtures * self.sampling_weights)

    def _solved(
        self, mixtures: np.ndarray, l2_scale: float | np.ndarray, initial: np.ndarray | None = None
    ) -> SurrogateSolution:
        """Optima of mixtures `(S, T)`, searched from `initial` `(S, k)`; float32 where they are rough."""
        sampled, penalties = mixtures * self.sampling_weights, self._penalties(mixtures, l2_scale)
        if not self._is_rough:
            return self._train.solve(sampled, penalties, initial=initial)
        start = None if initial is None else initial.astype(np.float32)
        unknown = np.full(len(mixtures), np.nan)
        return SurrogateSolution(self._train.approached(sampled, penalties, start), unknown, unknown)

    def _toggled(
        self, subset: np.ndarray, tasks: np.ndarray, mixtures: np.ndarray, l2_scale: float, optimum: np.ndarray | None
    ) -> np.ndarray:
        """Approximate optima `(C, k)` of the mixtures `(C, T)` that differ from a subset `(T,)` in one of `tasks`."""
        l2, new_l2 = self._penalties(subset[None], l2_scale)[0], self._penalties(mixtures, l2_scale)
        w = self._solved(subset[None], l2_scale).coefficients[0] if optimum is None else optimum
        return self._train.toggled(subset * self.sampling_weights, w, l2, tasks, self.sampling_weights[tasks], new_l2)


def _checked_lengths(others: Sequence[float], own: float, recipe: TrainingRecipe | None) -> tuple[float, ...]:
    """The other lengths, in order and once each."""
    if isinstance(others, str) or not isinstance(others, Sequence):
        raise EstimationError(f"Expected other_lengths as a list of numbers, found {others!r:.60}.")
    for length in others:
        check_number("other_lengths", length, 0, above=True, error=EstimationError)
    found = tuple(sorted({float(length) for length in others} - {own}))
    if found and recipe is None:
        raise EstimationError(
            f"Expected a recipe, which is replayed for other_lengths={list(found)}, found none. Leave other_lengths "
            "out, or capture the gradients with a recipe."
        )
    return found


def check_rows(table: FeatureTable, split: str) -> None:
    """Raise `EstimationError` for a table with a task that has no rows."""
    if (table.num_captured == 0).any():
        raise EstimationError(f"Task {table.task_names[int(np.argmin(table.num_captured))]!r} has no {split} rows.")
