"""Ensembles to train: choices with random settings, the choice within a budget, and others of at most its cost."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_ensemble.select import DataSelector, Grouping, predicted_losses
from hf_ensemble.select.settings import LENGTHS

NUM_CHOICES, NUM_ENSEMBLES = 10, 20


@dataclass(frozen=True)
class Ensemble:
    """Mixtures beside the adapter for all tasks, and who serves each task.

    Args:
        label (`str`): how it was made.
        mixtures (`list[dict[str, float]]`): what is trained besides.
        lengths (`list[float]`): of these trainings, in multiples of the recipe's.
        serving (`dict[str, int]`): index of each task's mixture; -1 for the adapter for all.
        cost (`float`): with the adapter for all.
        predicted_loss (`float`): mean over the tasks.
        expected_loss (`float`, *optional*): of a searched choice.
    """

    label: str
    mixtures: list[dict[str, float]]
    lengths: list[float]
    serving: dict[str, int]
    cost: float
    predicted_loss: float
    expected_loss: float | None = None


class Chooser:
    """Makes ensembles by the predictions of a run.

    Args:
        selector (`DataSelector`): predicts trainings from where those of the mixtures begin.
        goes_on (`bool`): whether that is the adapter for all tasks; mixtures are then of any of [`LENGTHS`].
        output_scales (`bool`): whether each task's outputs get a scale, as weights of an ensemble have one.
    """

    def __init__(self, selector: DataSelector, goes_on: bool = False, output_scales: bool = False):
        self.selector, self.goes_on, self.output_scales = selector, goes_on, output_scales
        self.estimator = selector.estimator.scaled() if output_scales else selector.estimator
        self.names = list(self.estimator.task_names)
        self._start = {"group_initialization": "baseline" if goes_on else "fresh"}

    def together(self) -> Ensemble:
        """The adapter for all tasks."""
        loss = float(self._loss_together().mean())
        return Ensemble("one adapter for all", [], [], dict.fromkeys(self.names, -1), 1.0, loss)

    def chosen(self, budget: float, label: str = "chosen", num_groups: int | None = None) -> Ensemble:
        """The choice of mixtures within a budget."""
        options = {"compute_budget": budget, "output_scales": self.output_scales, **self._start}
        return self.of_grouping(label, self.selector.group(num_groups, "mixtures", **options))

    def random_choices(self, seed: int) -> list[Ensemble]:
        """Choices with a random number of groups and a random budget."""
        rng = np.random.default_rng(seed)
        found = []
        for _ in range(NUM_CHOICES):
            count, budget = int(rng.integers(1, 6)), round(float(rng.uniform(1.2, 4.0)), 1)
            count = min(count, len(self.names))
            found.append(self.chosen(budget, f"at most {count} mixtures, budget {budget:g}", count))
        return found

    def rivals(self, budget: float, seed: int) -> list[Ensemble]:
        """Twenty other ensembles within a budget."""
        rng, size = np.random.default_rng(seed), len(self.names)
        counts = [count for count in (1, 2, 3, 4, 5) if count <= size]
        found = [self.chosen(budget, f"at most {count} mixtures", count) for count in counts]
        for count in [*counts[1:], min(8, size)]:
            if budget >= 2:
                found.append(self.of_grouping(f"{count} groups", self.selector.group(count, **self._start)))
        while len(found) < NUM_ENSEMBLES:
            count = int(rng.integers(1, 5))
            if len(found) % 2:
                weights = (rng.integers(count, size=size) == np.arange(count)[:, None]).astype(float)
                label = f"{count} random groups"
            else:
                weights = rng.uniform(size=(count, size)) * (rng.uniform(size=(count, size)) < 0.5)
                label = f"{count} random mixtures"
            weights = weights[weights.any(axis=1)]
            if not len(weights):
                continue
            weights /= weights.max(axis=1, keepdims=True)
            lengths = rng.choice(LENGTHS, size=len(weights)) if self.goes_on else np.ones(len(weights))
            one = self.of_mixtures(label, weights, lengths)
            if one.cost <= budget + 1e-9:
                found.append(one)
        return found

    def of_grouping(self, label: str, grouping: Grouping) -> Ensemble:
        """The ensemble of a choice."""
        names = [name for name in grouping.groups if name != grouping.baseline_group]
        losses = predicted_losses(self.estimator, grouping)
        rows, serving, own = list(grouping.groups), {}, []
        for column, task in enumerate(grouping.task_names):
            group = grouping.group_of(task)
            serving[task] = names.index(group) if group in names else -1
            own.append(losses[rows.index(group), column])
        mixtures, lengths = [grouping.mixtures[name] for name in names], [grouping.length_of(name) for name in names]
        predicted = float(np.mean(own))
        return Ensemble(label, mixtures, lengths, serving, grouping.cost, predicted, grouping.expected_loss)

    def of_mixtures(self, label: str, weights: np.ndarray, lengths: Sequence[float]) -> Ensemble:
        """The ensemble of given mixtures `(m, T)`, each task served by the one that is predicted to be its best."""
        lengths = np.asarray(lengths)
        own = self.estimator.predict(weights, lengths=lengths).loss
        losses = np.vstack([own, self._loss_together()])
        best = losses.argmin(axis=0)
        mixtures = [{name: float(value) for name, value in zip(self.names, row) if value > 0} for row in weights]
        serving = {name: int(own) if own < len(weights) else -1 for name, own in zip(self.names, best)}
        cost = 1.0 + float(self.estimator.training_cost(weights, lengths).sum())
        return Ensemble(label, mixtures, lengths.tolist(), serving, cost, float(losses.min(axis=0).mean()))

    def _loss_together(self) -> np.ndarray:
        if self.goes_on:
            return self.estimator.loss_at(np.zeros((1, self.estimator.reduction.components.shape[1])))[0]
        return self.estimator.predict(np.ones((1, len(self.names)))).loss[0]
