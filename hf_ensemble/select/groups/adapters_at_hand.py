"""Adapters that are trained anyway, or already, and that may serve tasks at no further cost."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ...estimate import ObservedRun, Prediction, SubsetEstimator
from ...estimate.mixtures import mixture_weights


@dataclass(frozen=True, eq=False)
class AdaptersAtHand:
    """Adapters of groups that were trained, in their order, then the one for all tasks where there is one.

    Args:
        names (`list[str]`): names of the groups that were trained.
        mixtures (`np.ndarray` of shape `(f, T)`): what they and the one for all tasks were trained on.
        losses (`np.ndarray` of shape `(f, T)`): loss of each task, measured for those that were trained.
        optima (`np.ndarray` of shape `(f, k)`): predicted optima.
        has_baseline (`bool`): whether the one for all tasks is among them.
        starts_at_baseline (`bool`): whether trainings begin where the one for all tasks has ended.
        cost (`float`): of all of them, in multiples of one adapter for all.
        calibrated (`np.ndarray` of shape `(f, T)`): the predicted losses.
    """

    names: list[str]
    mixtures: np.ndarray
    losses: np.ndarray
    optima: np.ndarray
    has_baseline: bool
    starts_at_baseline: bool
    cost: float
    calibrated: np.ndarray

    def __len__(self) -> int:
        return len(self.losses)

    @classmethod
    def of(
        cls,
        estimator: SubsetEstimator,
        trained: Mapping[str, ObservedRun],
        has_baseline: bool,
        starts_at_baseline: bool,
    ) -> "AdaptersAtHand":
        """Adapters with the losses that were measured, or else predicted.

        Once groups were trained, the one for all tasks has its measured loss too, where it is among the estimator's
        observed runs: what was measured is compared with what was measured. Where trainings begin at it, its losses are
        predicted as theirs are: those of the captured rows, at the level of all rows where one is known.
        """
        names = list(estimator.task_names)
        size = len(names)
        mixtures = [mixture_weights(run.mixture, names) for run in trained.values()]
        mixtures = np.array([*mixtures, *[np.ones(size)] * has_baseline]).reshape(-1, size)
        cost = float(has_baseline)
        if trained:
            cost += float(estimator.training_cost(mixtures[: len(trained)]).sum())
        optima, predicted = np.zeros((0, estimator.reduction.components.shape[1])), np.zeros((0, size))
        if len(mixtures):
            prediction = estimator.predict(mixtures)
            optima, predicted = prediction.coefficients, prediction.loss
            if starts_at_baseline and has_baseline:
                optima[-1] = 0.0
                predicted[-1] = estimator.loss_at(optima[-1:])[0]
        losses = predicted.copy()
        for row, run in enumerate(trained.values()):
            losses[row] = _measured(run, names, losses[row])
        if trained and has_baseline and not starts_at_baseline:
            for run in estimator.observed_runs:
                if np.array_equal(mixture_weights(run.mixture, names), np.ones(size)):
                    losses[-1] = _measured(run, names, losses[-1])
        return cls(list(trained), mixtures, losses, optima, has_baseline, starts_at_baseline, cost, predicted)

    def on(self, estimator: SubsetEstimator) -> "AdaptersAtHand":
        """The same with the losses that another estimator predicts, of a share of the validation rows or with scales.

        What was measured changes in proportion to what is predicted.
        """
        if not len(self):
            return self
        predicted = estimator.loss_at(self.optima)
        ratio = np.divide(predicted, self.calibrated, out=np.ones_like(predicted), where=self.calibrated > 0)
        return replace(self, losses=self.losses * ratio, calibrated=predicted)

    def one_for_all_optimum(self, together: Prediction) -> np.ndarray:
        """Optimum of the adapter for all tasks, `(k,)`; `together` predicts a training on them from here."""
        return np.zeros_like(together.coefficients[0]) if self.starts_at_baseline else together.coefficients[0]

    def one_for_all_loss(self, together: Prediction) -> np.ndarray:
        """Loss of each task with the adapter for all tasks, `(T,)`."""
        return self.losses[-1] if self.has_baseline else together.loss[0]


def _measured(run: ObservedRun, names: list[str], otherwise: np.ndarray) -> np.ndarray:
    losses = np.array([run.losses.get(name, np.nan) for name in names], dtype=np.float64)
    return np.where(np.isfinite(losses), losses, otherwise)
