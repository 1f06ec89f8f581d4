"""`SubsetEstimator`: predicts fine-tuning outcomes from gradient features."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from .._settings import check_at_least, check_number, checked_mapping
from ..errors import EstimationError
from ..store import FeatureTable, TrainingRecipe
from ..tasks.sampling import epoch_length
from .calibration import LossCalibration
from .intervals import IntervalWidth, SamplingNoise
from .mixtures import loss_weights, mixture_weights
from .prediction import Prediction
from .reduction import FeatureReduction, squared_row_norms
from .regularization import ObservedRun, Regularization, choose_regularization, losses_of
from .replay import replayed_coefficients
from .sensitivity import LossSensitivity
from .surrogate import SurrogateProblem
from .training_length import TrainingLength
from .validation_rows import ValidationRows


class SubsetEstimator:
    """Predicts the outcome of fine-tuning on any subset or mixture of tasks from gradient features.

    The surrogate's l2 penalty models the length of training: with a fixed number of epochs, more rows take more steps
    and move further from the linearization point, and Adam's steps do not shrink with the gradient, see
    [`TrainingLength`]. Its constant c is fitted, see [`choose_regularization`]. Observed runs also calibrate the losses
    of each task, see [`LossCalibration`].

    Args:
        train (`FeatureTable`): features of the training rows.
        validation (`FeatureTable`): features of the validation rows of the same tasks.
        num_components (`int`, *optional*, defaults to 400): number of principal components for the surrogate.
        observed_runs (`Sequence[ObservedRun]`, *optional*):
            Fine-tunings with known validation losses, to fit c and to calibrate.
        sampling_weights (`dict[str, float]`, *optional*):
            Sampling weight of each task's rows in training; they multiply every mixture.
        recipe (`TrainingRecipe`, *optional*):
            The training to predict, which determines how l2 depends on the mixture. Without observed runs it is
            replayed to fit c.
        device (`torch.device` or `str`, *optional*):
            Device for principal components and for solving surrogates, with float64. The CPU by default.
        task_loss_weighting (`str`, *optional*, defaults to `"tokens"`):
            What the training averages the loss of a step over, see [`loss_weights`].
        length (`float`, *optional*, defaults to 1.0):
            Length of the trainings to predict, in multiples of the recipe's. Observed runs are of this length too.

    Raises:
        `EstimationError`: for tasks without rows, and features that are not finite.

    Example:

    ```python
    >>> estimator = SubsetEstimator(store.table("train"), store.table("validation"))  # doctest: +SKIP
    >>> estimator.predict_subsets([["sst2", "mr"], ["sst2", "trec"]]).loss.shape  # doctest: +SKIP
    (2, 13)
    ```
    """

    def __init__(
        self,
        train: FeatureTable,
        validation: FeatureTable,
        num_components: int = 400,
        observed_runs: Sequence[ObservedRun] = (),
        sampling_weights: Mapping[str, float] | None = None,
        recipe: TrainingRecipe | None = None,
        device: torch.device | str | None = None,
        task_loss_weighting: str = "tokens",
        length: float = 1.0,
    ):
        check_at_least("num_components", num_components, 1)
        if not isinstance(observed_runs, Sequence) or not all(isinstance(run, ObservedRun) for run in observed_runs):
            raise EstimationError(f"Expected observed_runs as a list of ObservedRun, found {observed_runs!r:.80}.")
        if recipe is not None and not isinstance(recipe, TrainingRecipe):
            raise EstimationError(f"Expected recipe to be a TrainingRecipe, found {recipe!r:.60}.")
        if train.task_names != validation.task_names:
            raise EstimationError(
                f"Expected training and validation features of the same tasks, found {train.task_names} and "
                f"{validation.task_names}."
            )
        self.task_names = train.task_names
        for split, table in (("training", train), ("validation", validation)):
            if (table.num_captured == 0).any():
                raise EstimationError(
                    f"Task {self.task_names[int(np.argmin(table.num_captured))]!r} has no {split} rows."
                )
        # Of all rows, where the captured ones are a sample.
        self.counts, self.num_captured = train.sizes, train.num_captured
        self.token_counts = None
        if train.num_tokens is not None:
            tokens = np.bincount(train.task, train.num_tokens, len(self.task_names)) * train.rows_per_captured
            self.token_counts = np.rint(tokens).astype(int)
        for name, weight in checked_mapping("sampling_weights", sampling_weights or {}, EstimationError).items():
            check_number(f"The sampling weight of {name!r}", weight, 0, above=True, error=EstimationError)
        self.sampling_weights = mixture_weights(
            {**dict.fromkeys(self.task_names, 1.0), **(sampling_weights or {})}, self.task_names
        )
        self._fingerprints = {"train": train.fingerprint(), "validation": validation.fingerprint()}
        check_number("length", length, 0, above=True, error=EstimationError)
        self.length = length
        recipe = self._recipe = None if recipe is None else recipe.of_length(length)
        self.reduction = FeatureReduction.fit(train.features, num_components, device)
        reduced = self.reduction.apply(train.features)
        self.training_ids = tuple(zip((self.task_names[index] for index in train.task), train.example_id.tolist()))
        self.task_loss_weighting = task_loss_weighting
        row_weights = loss_weights(train, task_loss_weighting, self.sampling_weights)
        # How many rows each captured one stands for, and the weight of their losses.
        self._per_row = train.rows_per_captured[train.task]
        self._row_weights = row_weights * self._per_row
        self._train = SurrogateProblem(reduced, train.margin, train.task, device, self._row_weights)
        self._validation = ValidationRows(validation, self.reduction.apply(validation.features))
        self._validation_sizes = validation.sizes
        self.is_sampled = train.task_sizes is not None or validation.task_sizes is not None
        self.observed_runs = tuple(observed_runs)
        self.interval = IntervalWidth()
        self.calibration: LossCalibration | None = None
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
        replayed = []
        if recipe is not None and not observed_runs:
            drawn = self.sampling_weights[train.task] * self._per_row
            replayed = [self._replayed_run(reduced, train.margin, drawn, squared_norms, recipe, row_weights)]
        self.regularization: Regularization = choose_regularization(
            lambda mixtures, l2_scale: self.predict(mixtures, l2_scale).loss,
            self.task_names,
            self.observed_runs,
            replayed,
        )
        if self.observed_runs:
            mixtures, losses = losses_of(self.observed_runs, self.task_names)
            everything = self.predict(np.ones((1, len(self.task_names)))).loss[0]
            predicted, _, displacement = self._validation.outcomes(self.predict(mixtures).coefficients)
            self.calibration, left_out = LossCalibration.fit(self.base_loss(), everything, predicted, losses)
            self.interval = IntervalWidth.fit(left_out, displacement, losses)

    def predict_subsets(self, subsets: Iterable[Iterable[str] | Mapping[str, float]]) -> Prediction:
        """Predict the outcomes of subsets of task names, or of mixtures as dicts from name to weight.

        Raises:
            `EstimationError`: without a subset, and for unknown tasks and empty subsets.
        """
        if isinstance(subsets, str) or not isinstance(subsets, Iterable) or not (subsets := list(subsets)):
            raise EstimationError(f"Expected a list of subsets, each a list of task names, found {subsets!r}.")
        return self.predict(np.array([mixture_weights(subset, self.task_names) for subset in subsets]))

    def predict(
        self,
        mixtures: np.ndarray,
        l2_scale: float | np.ndarray | None = None,
        needed: np.ndarray | None = None,
        initial: np.ndarray | None = None,
    ) -> Prediction:
        """Predict the outcomes of mixtures.

        Args:
            mixtures (`np.ndarray` of shape `(S, T)`): weight of a row of each task; 0 and 1 for subsets.
            l2_scale (`float` or `np.ndarray` of shape `(S,)`, *optional*):
                Use this c instead of the fitted one. The losses are then the surrogate's, without intervals.
            needed (`np.ndarray` of shape `(S, T)`, *optional*):
                Mask of the outcomes to predict. The others are NaN, which saves much time with many tasks.
            initial (`np.ndarray` of shape `(S, k)`, *optional*): approximate optima to start from.

        Raises:
            `EstimationError`: for an empty mixture or negative weights.
        """
        try:
            mixtures = np.atleast_2d(np.asarray(mixtures, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise EstimationError(f"Expected mixtures as an array of numbers, found {mixtures!r:.80}.") from error
        if mixtures.shape[1] != len(self.task_names):
            raise EstimationError(f"Expected mixtures over {len(self.task_names)} tasks, found shape {mixtures.shape}.")
        if not np.isfinite(mixtures).all():
            raise EstimationError("Expected finite mixture weights, found NaN or infinity.")
        scale = self.regularization.l2_scale if l2_scale is None else l2_scale
        if not np.issubdtype(np.asarray(scale).dtype, np.number):
            raise EstimationError(f"Expected l2_scale as a number or one for each mixture, found {l2_scale!r:.60}.")
        sampled = mixtures * self.sampling_weights
        solution = self._train.solve(sampled, self._length.l2(scale, sampled), initial=initial)
        return self._predicted(mixtures, solution.coefficients, solution.gradient_norm, needed, l2_scale is not None)

    def predict_toggled(
        self,
        subset: np.ndarray,
        tasks: np.ndarray,
        needed: np.ndarray | None = None,
        optimum: np.ndarray | None = None,
    ) -> Prediction:
        """Approximate the outcomes of a subset with one task more or one less, for many tasks at once.

        The optima are those of one Newton step from the subset's own, which takes a small part of [`predict`]'s time.
        Their gradient norms are NaN.

        Args:
            subset (`np.ndarray` of shape `(T,)`): mask of the tasks; not empty, also without any of `tasks`.
            tasks (`np.ndarray` of shape `(C,)`): indices of the tasks to add, or to remove where the subset has them.
            needed (`np.ndarray` of shape `(C, T)`, *optional*): mask of the outcomes to predict; the others are NaN.
            optimum (`np.ndarray` of shape `(k,)`, *optional*): the subset's own optimum, if it is known.
        """
        subset = np.asarray(subset, dtype=np.float64)
        mixtures = np.repeat(subset[None], len(tasks), axis=0)
        mixtures[np.arange(len(tasks)), tasks] = 1.0 - subset[tasks]
        sampled, scale = subset[None] * self.sampling_weights, self.regularization.l2_scale
        l2 = self._length.l2(scale, sampled)
        w = self._train.solve(sampled, l2).coefficients[0] if optimum is None else optimum
        new_l2 = self._length.l2(scale, mixtures * self.sampling_weights)
        coefficients = self._train.toggled(sampled[0], w, l2[0], tasks, self.sampling_weights[tasks], new_l2)
        return self._predicted(mixtures, coefficients, np.full(len(tasks), np.nan), needed)

    def _predicted(
        self,
        mixtures: np.ndarray,
        coefficients: np.ndarray,
        gradient_norm: np.ndarray,
        needed: np.ndarray | None,
        as_surrogate: bool = False,
    ) -> Prediction:
        loss, accuracy, displacement = self._validation.outcomes(coefficients, needed)
        interval = IntervalWidth() if as_surrogate else self.interval
        if self.calibration is not None and not as_surrogate:
            loss = self.calibration(loss)

        def ends(own: Prediction) -> tuple[np.ndarray, np.ndarray]:
            is_noisy = self.is_sampled and np.isfinite(interval.level)
            return interval.around(own.loss, own.displacement, self.sampling_noise(own) if is_noisy else None)

        return Prediction(
            self.task_names,
            mixtures,
            loss,
            accuracy,
            displacement,
            interval.level,
            coefficients.astype(np.float64, copy=False),
            gradient_norm,
            ends,
        )

    def sampling_noise(self, prediction: Prediction) -> np.ndarray:
        """Standard error of predicted losses as those of all rows, `(S, T)`, in nats; see [`SamplingNoise`].

        Zero where all rows were captured.

        Args:
            prediction (`Prediction`): predictions of this estimator.
        """
        noise = SamplingNoise(self._train, self.counts, self._validation, self._validation_sizes, self.loss_at)
        sampled = prediction.mixtures * self.sampling_weights
        l2 = self._length.l2(self.regularization.l2_scale, sampled)
        rows = zip(prediction.coefficients, l2, sampled, np.isfinite(prediction.loss))
        return np.array([noise.of(*row) for row in rows])

    def _replayed_run(
        self,
        reduced: np.ndarray,
        margin: np.ndarray,
        drawn: np.ndarray,
        squared_norms: np.ndarray,
        recipe: TrainingRecipe,
        row_weights: np.ndarray,
    ) -> ObservedRun:
        """A training of the linearized model on all tasks."""
        scale = self.reduction.scale
        coefficients = replayed_coefficients(reduced, margin, drawn, squared_norms, scale, recipe, row_weights)
        losses = self._validation.outcomes(coefficients)[0][0]
        return ObservedRun(dict.fromkeys(self.task_names, 1.0), dict(zip(self.task_names, losses.tolist())))

    def provenance(self) -> dict[str, Any]:
        """What the predictions are made from, as JSON values. Estimators with the same provenance predict the same."""
        return {
            "features": self._fingerprints,
            "task_names": list(self.task_names),
            "num_components": self.reduction.components.shape[1],
            "sampling_weights": dict(zip(self.task_names, self.sampling_weights.tolist())),
            "task_loss_weighting": self.task_loss_weighting,
            "observed_runs": [{"mixture": dict(run.mixture), "losses": dict(run.losses)} for run in self.observed_runs],
            "recipe": None if self._recipe is None else asdict(self._recipe),
            "length": self.length,
            "l2_scale": self.regularization.l2_scale,
            "l2_evidence": self.regularization.evidence,
            "calibration": None if self.calibration is None else self.calibration.by_task(self.task_names),
        }

    def score_spread(
        self, coefficients: np.ndarray, reference: np.ndarray, targets: np.ndarray, metric: str = "loss"
    ) -> np.ndarray:
        """Standard error of the difference between two optima's scores on the targets, `(S,)`.

        It measures how much another sample of validation rows would change the difference, and does not include errors
        of the surrogate.

        Args:
            coefficients (`np.ndarray` of shape `(S, k)`): optima, see [`Prediction`].
            reference (`np.ndarray` of shape `(k,)`): the optimum to compare with.
            targets (`np.ndarray` of shape `(T,)`): weight of each task in the sum.
            metric (`str`, *optional*, defaults to `"loss"`): `"loss"` or `"accuracy"`.
        """
        slope = 1.0
        if metric == "loss":
            loss = self._validation.outcomes(reference, targets[None] > 0)[0][0]
            slope = np.where(targets > 0, self._calibration_slope(loss), 0.0)
        return self._validation.spread(coefficients, reference, targets * slope, metric)

    def truncated(self, num_components: int) -> "SubsetEstimator":
        """The same estimator in its first principal components alone: less exact, and faster by about their share."""
        check_at_least("num_components", num_components, 1)
        other = copy.copy(self)
        other._train = self._train.truncated(num_components)
        other._validation = self._validation.truncated(num_components)
        other._length = self._length.truncated(num_components)
        return other

    @property
    def has_fixed_steps(self) -> bool:
        """Whether a training takes the same number of steps whatever it is on."""
        return self._recipe is not None and self._recipe.fixed_steps

    def training_cost(self, mixtures: np.ndarray) -> np.ndarray:
        """Cost of training on mixtures `(S, T)`: rows drawn, in multiples of a whole training on all tasks, `(S,)`."""
        if self.has_fixed_steps:
            return np.full(len(mixtures), self.length)
        everything = epoch_length(self.sampling_weights, self.counts)
        return self.length * epoch_length(mixtures * self.sampling_weights, self.counts) / everything

    def halves(self, seed: int = 0) -> tuple["SubsetEstimator", "SubsetEstimator"]:
        """Two estimators with the same optima, each of the losses on a random half of every task's validation rows.

        The penalty and the calibration's factors are those of all rows; what they are applied to, the moves of the
        losses from those at the linearization point, are of the half alone.

        Args:
            seed (`int`, *optional*, defaults to 0): seed of the halves.
        """
        first, second = copy.copy(self), copy.copy(self)
        first._validation, second._validation = self._validation.halves(seed)
        if self.calibration is not None:
            for half in (first, second):
                half.calibration = self.calibration.around(half.base_loss())
        return first, second

    def loss_at(self, coefficients: np.ndarray, needed: np.ndarray | None = None) -> np.ndarray:
        """Predicted losses `(S, T)` at optima `(S, k)`; NaN outside a mask `(S, T)`. See [`Prediction`]."""
        loss = self._validation.outcomes(coefficients, needed)[0]
        return loss if self.calibration is None else self.calibration(loss)

    def base_loss(self) -> np.ndarray:
        """Validation loss of each task at the linearization point, `(T,)`."""
        return self._validation.outcomes(np.zeros(self.reduction.components.shape[1]))[0][0]

    def weighted_loss(self, weights: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
        """Weighted predicted loss of tasks, and its derivatives with respect to the sampling weights.

        Args:
            weights (`np.ndarray` of shape `(T,)`):
                Sampling weight of each task's rows, from 0 to 1; an epoch has `weights @ counts` rows. The estimator's
                own sampling weights are not applied.
            targets (`np.ndarray` of shape `(T,)`): weight of each task's predicted loss in the sum.

        Returns:
            `tuple[float, np.ndarray]`: the weighted sum of the losses, in nats, and its derivatives `(T,)`.

        Raises:
            `EstimationError`: for weights that are all zero or not from 0 to 1.
        """
        return self.sensitivity(targets).to_weights(weights)

    def example_influence(self, weights: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """How much the targets' predicted loss falls when a training row is sampled once more, for each row, `(n,)`.

        To first order and at a fixed length of training: the negative derivative of the loss with respect to the row's
        weight, as in [`weighted_loss`]. Harmful rows have negative values. Rows of tasks with weight 0 are included.

        Args:
            weights (`np.ndarray` of shape `(T,)`): sampling weight of each task's rows, from 0 to 1.
            targets (`np.ndarray` of shape `(T,)`): weight of each task's predicted loss in the sum.

        Raises:
            `EstimationError`: as for [`weighted_loss`].
        """
        return self.sensitivity(targets).to_examples(weights) / self._per_row

    def sensitivity(self, targets: np.ndarray) -> LossSensitivity:
        """The weighted predicted loss of tasks `(T,)` as a function of the sampling weights, for several of these."""
        return LossSensitivity(
            self._train,
            self._length,
            self.regularization.l2_scale,
            self._row_weights,
            self._validation,
            self.calibration,
            targets,
        )

    def single_task_slopes(self, targets: np.ndarray) -> np.ndarray:
        """How each task's loss after a training on itself changes with the weights of all tasks, `(T, T)`.

        Row t is what [`weighted_loss`] gives for the weights and the target of task t alone, up to float32 precision.

        Args:
            targets (`np.ndarray` of shape `(T,)`): weight of each task's loss.
        """
        alone, totals, scale = np.eye(len(self.task_names)), self._train.totals, self.regularization.l2_scale
        pairs = [self.sensitivity(row * targets).direction(row) for row in alone]
        optima, directions = (np.stack(arrays) for arrays in zip(*pairs))
        penalties, changes = zip(*(self._length.l2_with_gradient(scale, row) for row in alone))
        product = 2 * (optima * directions).sum(axis=1, keepdims=True)
        of_rows = self._train.task_slopes(optima, directions) + np.outer(penalties, totals) * product
        return -of_rows / totals[:, None] - np.stack(changes) * product

    def _calibration_slope(self, loss: np.ndarray) -> np.ndarray:
        return np.ones_like(loss) if self.calibration is None else self.calibration.slope(loss)

    def task_gradients(self) -> np.ndarray:
        """Mean negative loss gradient of each task's training rows at the linearization point, `(T, k)`."""
        return self._length.task_gradients()

    def linear_margins(self, coefficients: np.ndarray) -> dict[tuple[str, str], float]:
        """Margin m_i + x_i.w of every validation example by (task, example id), for one w `(k,)`."""
        return self._validation.by_example(coefficients)

    def penalty(self, mixture: np.ndarray) -> float:
        """l2 of a mixture `(T,)` for coefficients of the captured features, in place of the reduced ones."""
        sampled = np.asarray(mixture, dtype=np.float64)[None] * self.sampling_weights
        return float(self._length.l2(self.regularization.l2_scale, sampled)[0]) * self.reduction.scale**2

    def parameters_at(self, coefficients: np.ndarray) -> np.ndarray:
        """Coefficients `(..., d)` of the captured features, as [`applied_update`] takes them."""
        return self.reduction.restore(coefficients)
