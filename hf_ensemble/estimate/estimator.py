"""`SubsetEstimator`: predicts fine-tuning outcomes from gradient features."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve

from .._settings import check_at_least, check_number, checked_mapping
from ..errors import EstimationError
from ..store import FeatureTable, TrainingRecipe
from .calibration import LossCalibration
from .intervals import IntervalWidth
from .mixtures import mixture_weights
from .outcomes import predicted_outcomes
from .prediction import Prediction
from .reduction import FeatureReduction, squared_row_norms
from .regularization import ObservedRun, Regularization, choose_regularization, losses_of
from .replay import replayed_coefficients
from .surrogate import SurrogateProblem
from .training_length import TrainingLength

# Gradient norm for derivatives with respect to the mixture, which are more sensitive than the losses.
_TIGHT = 1e-10


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
        device (`torch.device` or `str`, *optional*): device for solving surrogates. The CPU by default.

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
        self.counts = np.bincount(train.task, minlength=len(self.task_names))
        self.token_counts = None
        if train.num_tokens is not None:
            self.token_counts = np.bincount(train.task, train.num_tokens, len(self.task_names)).astype(int)
        for split, table in (("training", train), ("validation", validation)):
            rows = np.bincount(table.task, minlength=len(self.task_names))
            if (rows == 0).any():
                raise EstimationError(f"Task {self.task_names[int(np.argmin(rows))]!r} has no {split} rows.")
        for name, weight in checked_mapping("sampling_weights", sampling_weights or {}, EstimationError).items():
            check_number(f"The sampling weight of {name!r}", weight, 0, above=True, error=EstimationError)
        self.sampling_weights = mixture_weights(
            {**dict.fromkeys(self.task_names, 1.0), **(sampling_weights or {})}, self.task_names
        )
        self._fingerprints = {"train": train.fingerprint(), "validation": validation.fingerprint()}
        self._recipe = recipe
        self.reduction = FeatureReduction.fit(train.features, num_components)
        reduced = self.reduction.apply(train.features)
        self.training_ids = tuple(zip((self.task_names[index] for index in train.task), train.example_id.tolist()))
        self._row_weights = _row_weights(train)
        self._train = SurrogateProblem(reduced, train.margin, train.task, device, self._row_weights)
        order = np.argsort(validation.task, kind="stable")
        self._validation = (
            self.reduction.apply(validation.features)[order],
            validation.margin[order].astype(np.float64),
            validation.task[order],
        )
        self._validation_ids = validation.example_id[order].tolist()
        if not np.isfinite(self._validation[0]).all():
            raise EstimationError("Expected finite validation features, found NaN or infinity. Capture them again.")
        self.observed_runs = tuple(observed_runs)
        self.interval = IntervalWidth()
        self.calibration: LossCalibration | None = None
        squared_norms = squared_row_norms(train.features) if recipe is not None else np.zeros(len(train))
        self._length = TrainingLength(
            reduced,
            squared_norms / self.reduction.scale**2,
            train.margin,
            train.task,
            self.sampling_weights,
            recipe,
            self._row_weights,
        )
        replayed = []
        if recipe is not None and not observed_runs:
            replayed = [self._replayed_run(train, reduced, squared_norms, recipe)]
        self.regularization: Regularization = choose_regularization(
            lambda mixtures, l2_scale: self.predict(mixtures, l2_scale).loss,
            self.task_names,
            self.observed_runs,
            replayed,
        )
        if self.observed_runs:
            mixtures, losses = losses_of(self.observed_runs, self.task_names)
            everything = self.predict(np.ones((1, len(self.task_names)))).loss[0]
            predicted, _, displacement = self._outcomes(self.predict(mixtures).coefficients)
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

    def predict(self, mixtures: np.ndarray, l2_scale: float | np.ndarray | None = None) -> Prediction:
        """Predict the outcomes of mixtures.

        Args:
            mixtures (`np.ndarray` of shape `(S, T)`): weight of a row of each task; 0 and 1 for subsets.
            l2_scale (`float` or `np.ndarray` of shape `(S,)`, *optional*):
                Use this c instead of the fitted one. The losses are then the surrogate's, without intervals.

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
        solution = self._train.solve(sampled, self._length.l2(scale, sampled))
        loss, accuracy, displacement = self._outcomes(solution.coefficients)
        interval = self.interval
        if l2_scale is not None:
            interval = IntervalWidth()
        elif self.calibration is not None:
            loss = self.calibration(loss)
        return Prediction(
            self.task_names,
            mixtures,
            loss,
            accuracy,
            *interval.around(loss, displacement),
            solution.coefficients,
            solution.gradient_norm,
        )

    def _replayed_run(
        self, train: FeatureTable, reduced: np.ndarray, squared_norms: np.ndarray, recipe: TrainingRecipe
    ) -> ObservedRun:
        """A training of the linearized model on all tasks."""
        coefficients = replayed_coefficients(
            reduced,
            train.margin,
            self.sampling_weights[train.task],
            squared_norms,
            self.reduction.scale,
            recipe,
            self._row_weights,
        )
        losses = self._outcomes(coefficients[None])[0][0]
        return ObservedRun(dict.fromkeys(self.task_names, 1.0), dict(zip(self.task_names, losses.tolist())))

    def _outcomes(self, coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return predicted_outcomes(*self._validation, len(self.task_names), coefficients)

    def provenance(self) -> dict[str, Any]:
        """What the predictions are made from, as JSON values. Estimators with the same provenance predict the same."""
        return {
            "features": self._fingerprints,
            "task_names": list(self.task_names),
            "num_components": self.reduction.components.shape[1],
            "sampling_weights": dict(zip(self.task_names, self.sampling_weights.tolist())),
            "observed_runs": [{"mixture": dict(run.mixture), "losses": dict(run.losses)} for run in self.observed_runs],
            "recipe": None if self._recipe is None else asdict(self._recipe),
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
        features, margin, task = self._validation
        variance = np.zeros(len(coefficients))
        slope = self._calibration_slope(self._outcomes(reference[None])[0][0]) if metric == "loss" else 1.0
        weights = targets * slope
        for index in np.flatnonzero(targets):
            rows = task == index
            z = margin[rows] + np.vstack([coefficients, reference]) @ features[rows].T
            scores = (z > 0).astype(np.float64) if metric == "accuracy" else np.logaddexp(0.0, -z)
            variance += weights[index] ** 2 * (scores[:-1] - scores[-1]).var(axis=1) / rows.sum()
        return np.sqrt(variance)

    def base_loss(self) -> np.ndarray:
        """Validation loss of each task at the linearization point, `(T,)`."""
        return self._outcomes(np.zeros((1, self.reduction.components.shape[1])))[0][0]

    def weighted_loss(self, weights: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
        """Weighted predicted loss of tasks, and its derivatives with respect to the sampling weights.

        By the implicit function theorem at the surrogate's optimum, with its Hessian H and the loss L,

            dL / d a_k = -(dL / dw) H^-1 (d^2 F / dw d a_k)

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
        weights = self._checked_weights(weights)
        l2, l2_slope = self._length.l2_with_gradient(self.regularization.l2_scale, weights)
        w, value, direction, gradients = self._at_optimum(weights, l2, targets)
        mixed = (gradients + 2 * l2 * np.outer(self._train.totals, w)) / (weights @ self._train.totals) + 2 * np.outer(
            l2_slope, w
        )
        return value, -mixed @ direction

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
        weights = self._checked_weights(weights)
        l2, _ = self._length.l2_with_gradient(self.regularization.l2_scale, weights)
        w, _, direction, _ = self._at_optimum(weights, l2, targets)
        slopes = self._train.row_slopes(w, direction) + 2 * l2 * (w @ direction) * self._row_weights
        return slopes / (weights @ self._train.totals)

    def _checked_weights(self, weights: np.ndarray) -> np.ndarray:
        weights = np.asarray(weights, dtype=np.float64)
        if weights.shape != self.counts.shape or not ((weights >= 0) & (weights <= 1)).all() or not weights.any():
            raise EstimationError(f"Expected {len(self.counts)} weights from 0 to 1, not all zero, found {weights}.")
        return weights

    def _at_optimum(
        self, weights: np.ndarray, l2: float, targets: np.ndarray
    ) -> tuple[np.ndarray, float, np.ndarray, np.ndarray]:
        """The optimum w, the targets' loss there, H^-1 times its gradient, and each task's summed gradient."""
        w = self._train.solve(weights[None], np.array([l2]), _TIGHT).coefficients[0]
        features, margin, task = self._validation
        z = margin + features @ w
        counts = np.bincount(task)
        loss = np.bincount(task, np.logaddexp(0.0, -z)) / counts
        value = float(targets @ (loss if self.calibration is None else self.calibration(loss)))
        of_row = (targets * self._calibration_slope(loss) / counts)[task]
        slope = -(of_row * np.exp(-np.logaddexp(0.0, z))) @ features
        hessian, gradients = self._train.derivatives(weights, w, l2)
        return w, value, cho_solve(cho_factor(hessian), slope), gradients

    def _calibration_slope(self, loss: np.ndarray) -> np.ndarray:
        return np.ones_like(loss) if self.calibration is None else self.calibration.slope(loss)

    def task_gradients(self) -> np.ndarray:
        """Mean negative loss gradient of each task's training rows at the linearization point, `(T, k)`."""
        return self._length.task_gradients()

    def linear_margins(self, coefficients: np.ndarray) -> dict[tuple[str, str], float]:
        """Margin m_i + x_i.w of every validation example by (task, example id), for one w `(k,)`."""
        features, margin, task = self._validation
        names = (self.task_names[index] for index in task)
        return dict(zip(zip(names, self._validation_ids), (margin + features @ coefficients).tolist()))

    def parameters_at(self, coefficients: np.ndarray) -> np.ndarray:
        """Coefficients `(..., d)` of the captured features, as [`applied_update`] takes them."""
        return self.reduction.restore(coefficients)


def _row_weights(train: FeatureTable) -> np.ndarray:
    """Weight of each row's loss in a batch, with mean 1: transformers and trl average the loss over tokens."""
    if train.num_tokens is None:
        return np.ones(len(train))
    return train.num_tokens / train.num_tokens.mean()
