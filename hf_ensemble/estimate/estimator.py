"""`SubsetEstimator`: predicts fine-tuning outcomes from gradient features."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from ..errors import EstimationError
from ..store import FeatureTable, TrainingRecipe
from .calibration import LossCalibration
from .intervals import IntervalWidth
from .linearized_training import LinearizedTraining, check_rows
from .mixtures import checked_mixtures, mixture_weights
from .prediction import Prediction
from .regularization import ObservedRun, Regularization, choose_regularization, losses_of
from .sampling_noise import SamplingNoise
from .sensitivity import LossSensitivity
from .validation_rows import ValidationRows

# From this number of training or validation rows on, c is searched for with approximate losses, about where those of so
# many rows are best.
_MOST_FITTED, _ROUGHLY_FITTED = 50_000, 20_000
# Of log(c), where there are more.
_ROUGH_ACCURACY = 1e-3


class SubsetEstimator(LinearizedTraining):
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
        other_lengths (`Sequence[float]`, *optional*):
            Further lengths that predictions may be asked for. The recipe is replayed for each, on at most 20,000 rows,
            and c is that of `length` times the ratio of what the two replays come to.

    Raises:
        `EstimationError`: for tasks without rows, features that are not finite, and other lengths without a recipe.
        `ConfigurationError`: for a device that is not there, or has no float64.

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
        other_lengths: Sequence[float] = (),
    ):
        if not isinstance(observed_runs, Sequence) or not all(isinstance(run, ObservedRun) for run in observed_runs):
            raise EstimationError(f"Expected observed_runs as a list of ObservedRun, found {observed_runs!r:.80}.")
        if train.task_names != validation.task_names:
            raise EstimationError(
                f"Expected training and validation features of the same tasks, found {train.task_names} and "
                f"{validation.task_names}."
            )
        check_rows(validation, "validation")
        weights, replays = sampling_weights or {}, not observed_runs
        options = recipe, device, task_loss_weighting, length, other_lengths, replays
        super().__init__(train, num_components, weights, *options)
        self._fingerprints = {"train": train.fingerprint(), "validation": validation.fingerprint()}
        self._validation = ValidationRows(validation, self.reduction.apply(validation.features))
        self._validation_sizes = validation.sizes
        self._is_sampled = train.task_sizes is not None or validation.task_sizes is not None
        self.observed_runs = tuple(observed_runs)
        self.interval = IntervalWidth()
        self.calibration: LossCalibration | None = None
        # Optimum of a run whose loss over all validation rows of a task is known, by the task's index.
        self._anchors: dict[int, np.ndarray] = {}
        self.regularization: Regularization = self._fitted_regularization(self.observed_runs, self._replayed)
        self._length_ratios = self._fitted_ratios()
        if self.observed_runs:
            mixtures, losses = losses_of(self.observed_runs, self.task_names)
            # What moves the losses is seen on the rows that predictions are for.
            captured = losses_of(self.observed_runs, self.task_names, of_captured=True)[1]
            together = self.predict(np.ones((1, len(self.task_names))))
            is_together = (mixtures == 1).all(axis=1)
            optima = np.repeat(together.coefficients, len(mixtures), axis=0)
            if not is_together.all():
                optima[~is_together] = self.predict(mixtures[~is_together]).coefficients
            predicted, _, displacement = self._validation.outcomes(optima)
            calibration, left_out = LossCalibration.fit(self.base_loss(), together.loss[0], predicted, captured)
            self.calibration = calibration.of_all_rows(captured, losses)
            self.interval = IntervalWidth.fit(left_out, displacement, captured)
            for optimum, run in zip(optima.astype(np.float64), self.observed_runs):
                for name in set(self.task_names) & run.tasks_with_level():
                    self._anchors.setdefault(self.task_names.index(name), optimum)

    def _fitted_ratios(self) -> dict[float, float]:
        """c of each length, in multiples of that of the estimator's own."""
        if len(self.lengths) == 1:
            return {self.length: 1.0}
        ends = self._replayed_lengths.items()
        scales = {length: self._fitted_regularization((), end).l2_scale for length, end in ends}
        return {length: scale / scales[self.length] for length, scale in scales.items()}

    def _scales(self, lengths: np.ndarray) -> np.ndarray:
        """c of trainings of these lengths, `(S,)`."""
        unknown = [float(own) for own in np.ravel(lengths) if float(own) not in self._length_ratios]
        if unknown:
            raise EstimationError(
                f"Expected lengths among {sorted(self.lengths)}, found {unknown[0]:g}. Pass it to other_lengths."
            )
        ratios = [self._length_ratios[float(own)] for own in np.ravel(lengths)]
        return self.regularization.l2_scale * np.array(ratios)

    def _fitted_regularization(
        self, observed_runs: Sequence[ObservedRun], replayed: np.ndarray | None
    ) -> Regularization:
        """c from what there is: first about where it is, from approximate losses, of many rows those of some.

        `replayed` `(k,)` is where a replayed training has ended.
        """
        replayed = [] if replayed is None else [self._replayed_run(replayed)]
        is_small = self.num_rows <= _MOST_FITTED
        rough = (self if is_small else self.sampled(_ROUGHLY_FITTED))._loss_by_scale(exactly=False)
        options = {} if is_small else {"accuracy": _ROUGH_ACCURACY}
        return choose_regularization(
            self._loss_by_scale(exactly=is_small), rough, self.task_names, observed_runs, replayed, **options
        )

    def _loss_by_scale(self, exactly: bool) -> Callable[[np.ndarray, float], np.ndarray]:
        """Losses `(S, T)` of mixtures `(S, T)` for a c, each time from the optima of the time before; or in float32."""
        last: np.ndarray | None = None

        def loss(mixtures: np.ndarray, l2_scale: float) -> np.ndarray:
            nonlocal last
            if exactly:
                last = self._solved(mixtures, l2_scale, last).coefficients
            else:
                penalties = self._penalties(mixtures, l2_scale)
                last = self._train.approached(mixtures * self.sampling_weights, penalties, last)
            return self._validation.outcomes(last)[0]

        return loss

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
        lengths: np.ndarray | None = None,
    ) -> Prediction:
        """Predict the outcomes of mixtures.

        Args:
            mixtures (`np.ndarray` of shape `(S, T)`): weight of a row of each task; 0 and 1 for subsets.
            l2_scale (`float` or `np.ndarray` of shape `(S,)`, *optional*):
                Use this c instead of the fitted one. The losses are then the surrogate's, without intervals.
            needed (`np.ndarray` of shape `(S, T)`, *optional*):
                Mask of the outcomes to predict. The others are NaN, which saves much time with many tasks.
            initial (`np.ndarray` of shape `(S, k)`, *optional*): approximate optima to start from.
            lengths (`np.ndarray` of shape `(S,)`, *optional*):
                Length of each training, one that the estimator knows; its own by default, and with `l2_scale`.

        Raises:
            `EstimationError`: for an empty mixture, negative weights, and lengths that the estimator does not know.
        """
        mixtures = checked_mixtures(mixtures, len(self.task_names))
        scale = self.regularization.l2_scale if l2_scale is None else l2_scale
        if lengths is not None and l2_scale is None:
            scale = self._scales(lengths)
        if not np.issubdtype(np.asarray(scale).dtype, np.number):
            raise EstimationError(f"Expected l2_scale as a number or one for each mixture, found {l2_scale!r:.60}.")
        solution = self._solved(mixtures, scale, initial)
        optima = solution.coefficients, solution.gradient_norm
        return self._predicted(mixtures, *optima, scale, needed, l2_scale is not None)

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
        scale = self.regularization.l2_scale
        coefficients = self._toggled(subset, tasks, mixtures, scale, optimum)
        return self._predicted(mixtures, coefficients, np.full(len(tasks), np.nan), scale, needed)

    def _predicted(
        self,
        mixtures: np.ndarray,
        coefficients: np.ndarray,
        gradient_norm: np.ndarray,
        l2_scale: float | np.ndarray,
        needed: np.ndarray | None,
        as_surrogate: bool = False,
    ) -> Prediction:
        loss, accuracy, displacement = self._validation.outcomes(coefficients, needed)
        interval = IntervalWidth() if as_surrogate else self.interval
        if self.calibration is not None and not as_surrogate:
            loss = self._calibrated(loss, needed)

        def ends(own: Prediction) -> tuple[np.ndarray, np.ndarray]:
            is_noisy = self._is_sampled and np.isfinite(interval.level)
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
            np.broadcast_to(l2_scale, len(mixtures)),
            ends,
        )

    def sampling_noise(self, prediction: Prediction) -> np.ndarray:
        """Standard error of predicted losses as those of all rows, `(S, T)`, in nats; see [`SamplingNoise`].

        Zero where all rows were captured, NaN where a single one of several was.

        Args:
            prediction (`Prediction`): predictions of this estimator.
        """
        rows = self._train, self.counts, self._validation, self._validation_sizes
        noise = SamplingNoise(*rows, self.loss_at, self._slopes_at, self._anchors)
        l2 = self._penalties(prediction.mixtures, prediction.l2_scale)
        sampled = prediction.mixtures * self.sampling_weights
        optima = zip(prediction.coefficients, l2, sampled, np.isfinite(prediction.loss))
        return np.array([noise.of(*optimum) for optimum in optima])

    def _replayed_run(self, optimum: np.ndarray) -> ObservedRun:
        """A training of the linearized model on all tasks, by where it has ended `(k,)`."""
        losses = self._validation.outcomes(optimum)[0][0]
        return ObservedRun(dict.fromkeys(self.task_names, 1.0), dict(zip(self.task_names, losses.tolist())))

    def provenance(self) -> dict[str, Any]:
        """What the predictions are made from, as JSON values. Estimators with the same provenance predict the same."""
        return {
            "features": self._fingerprints,
            "task_names": list(self.task_names),
            "num_components": self.reduction.components.shape[1],
            "sampling_weights": dict(zip(self.task_names, self.sampling_weights.tolist())),
            "task_loss_weighting": self.task_loss_weighting,
            "observed_runs": [run.as_dict() for run in self.observed_runs],
            "recipe": None if self._recipe is None else asdict(self._recipe),
            "length": self.length,
            "other_lengths": list(self.lengths[1:]),
            "l2_scale": self.regularization.l2_scale,
            "l2_evidence": self.regularization.evidence,
            "calibration": None if self.calibration is None else self.calibration.by_task(self.task_names),
            "output_scales": self.is_scaled,
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
        if metric == "loss":
            targets = targets * self._slopes_at(reference, targets > 0)
        return self._validation.spread(coefficients, reference, targets, metric)

    def truncated(self, num_components: int) -> "SubsetEstimator":
        """The same estimator in its first principal components alone: less exact, and faster by about their share."""
        other = super().truncated(num_components)
        other._validation = self._validation.truncated(num_components)
        return other

    @property
    def can_be_scaled(self) -> bool:
        """Whether losses with a scale of each task's outputs can be predicted of any task, see [`scaled`]."""
        return self._validation.can_be_scaled

    @property
    def is_scaled(self) -> bool:
        """Whether losses are those with a scale of each task's outputs."""
        return self._validation.is_scaled

    def scaled(self) -> "SubsetEstimator":
        """The same estimator, of losses that are left once a scale of each task's outputs is fitted.

        Weights of an ensemble have such a scale, the inverse of a temperature. It is fitted to the validation rows, see
        [`ScaledRows`]; tasks whose answers have several tokens have none. A calibration's factors are those of the
        losses without it, and predictions have no intervals.

        Raises:
            `EstimationError`: for features without the entropy of the other answers.
        """
        if not self.can_be_scaled:
            raise EstimationError(
                "Expected validation features with the entropy of the other answers, found none. It is known of "
                "answers of one token, captured with margin='geometric_mean' or 'mean_log_odds'."
            )
        other = copy.copy(self)
        other._validation, other.interval = self._validation.scaled(), IntervalWidth()
        if self.calibration is not None:
            other.calibration = self.calibration.around(other.base_loss())
        return other

    @property
    def num_rows(self) -> int:
        """Number of captured training rows, or of validation rows if these are more."""
        return max(len(self.training_ids), len(self._validation))

    def sampled(self, most_rows: int, seed: int = 0) -> "SubsetEstimator":
        """The same estimator with mixtures predicted from at most so many rows of all tasks, or itself with no more.

        It is for searches among many mixtures. An equal number of training rows of each task, and of validation rows,
        is drawn, see [`sampled_rows`]; tasks with fewer have all of theirs. Lengths of trainings, the penalty and the
        calibration's factors are those of all rows, which the sample stands for, and so are [`task_gradients`].
        Optima are found in float32, and intervals do not allow for the sample.

        Args:
            most_rows (`int`): number of training rows, and of validation rows.
            seed (`int`, *optional*, defaults to 0): seed of the sample.
        """
        if self.num_rows <= most_rows:
            return self
        other = copy.copy(self)
        other._train, other._validation = (
            self._train.sampled(most_rows, seed),
            self._validation.sampled(most_rows, seed),
        )
        other._is_sampled, other._is_rough = False, True
        if self.calibration is not None:
            other.calibration = self.calibration.around(other.base_loss())
        return other

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
        return loss if self.calibration is None else self._calibrated(loss, needed)

    def _calibrated(self, loss: np.ndarray, needed: np.ndarray | None) -> np.ndarray:
        """Calibrated losses `(S, T)`; where few tasks are needed, the others' are left alone."""
        if needed is None or (asked := needed.any(axis=0)).mean() > 0.5:
            return self.calibration(loss)
        loss[:, asked] = self.calibration.of_tasks(asked)(loss[:, asked])
        return loss

    def _slopes_at(self, w: np.ndarray, needed: np.ndarray) -> np.ndarray:
        """Slope of each predicted loss in the surrogate's at an optimum `(k,)`, `(T,)`; 0 outside a mask `(T,)`."""
        if self.calibration is None:
            return needed.astype(np.float64)
        loss = self._validation.outcomes(w, needed[None])[0][0]
        return np.where(needed, self.calibration.slope(loss), 0.0)

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

    def sensitivity(self, targets: np.ndarray, length: float | None = None) -> LossSensitivity:
        """The weighted predicted loss of tasks `(T,)` as a function of the sampling weights, for several of these.

        The length of the trainings is the estimator's own by default.
        """
        scale = self.regularization.l2_scale if length is None else float(self._scales(np.array([length]))[0])
        return LossSensitivity(
            self._train,
            self._length,
            scale,
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

    def linear_margins(self, coefficients: np.ndarray) -> dict[tuple[str, str], float]:
        """Margin m_i + x_i.w of every validation example by (task, example id), for one w `(k,)`."""
        return self._validation.by_example(coefficients)

    def penalty(self, mixture: np.ndarray) -> float:
        """l2 of a mixture `(T,)` for coefficients of the captured features, in place of the reduced ones."""
        own = self._penalties(np.asarray(mixture, dtype=np.float64)[None], self.regularization.l2_scale)
        return float(own[0]) * self.reduction.scale**2
