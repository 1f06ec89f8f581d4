"""Adapters for single tasks, each trained on its task alone."""

import numpy as np

from ...estimate import SubsetEstimator
from .adapters_at_hand import AdaptersAtHand
from .facility_location import NO_LOSS
from .mixture_search import MixtureSet, pareto

# Sets of different costs that are offered, at most.
_MAX_SETS = 12


class TasksAlone:
    """An adapter for each task whose loss counts, or for some of them, trained on the task alone.

    Those that are trained already are taken as they are.

    Args:
        estimator (`SubsetEstimator`): makes the predictions.
        at_hand (`AdaptersAtHand`): adapters that serve tasks besides.
        goal (`np.ndarray` of shape `(T,)`): weight of each task's loss.
    """

    def __init__(self, estimator: SubsetEstimator, at_hand: AdaptersAtHand, goal: np.ndarray):
        self._estimator, self._at_hand, self._goal = estimator, at_hand, goal
        singles = [(row, one) for row, one in enumerate(at_hand.mixtures) if np.count_nonzero(one) == 1]
        self._trained = {int(np.argmax(one)): row for row, one in singles}
        self.left = [task for task in np.flatnonzero(goal).tolist() if task not in self._trained]

    def every(self, most: int, budget: float | None) -> list[MixtureSet]:
        """One for each task, all of the estimator's own length: no validation row has chosen a task or a length.

        Args:
            most (`int`): number of adapters that may be trained.
            budget (`float`, *optional*): cost of their trainings.
        """
        if np.count_nonzero(self._goal) < 2 or not 0 < len(self.left) <= most:
            return []
        found = self._set(np.array(self.left), np.full(len(self.left), self._estimator.length, dtype=np.float64))
        return [found] if budget is None or found.cost <= budget + 1e-9 else []

    def some(self, most: int, budget: float | None) -> list[MixtureSet]:
        """Tasks and lengths of their trainings that lower the loss most for what they cost, at several costs.

        What [`every`] gives is not among them.

        The steps from one length of a task to the next are taken in the order of gain by cost, along the convex hull of
        each task's lengths (the greedy solution of the multiple-choice knapsack problem: Kellerer, Pferschy and
        Pisinger 2004, Knapsack Problems, 11.2). Steps that the budget does not pay for are left out. Where there may be
        fewer adapters than tasks, this is done for those with the largest gains as well.
        """
        if np.count_nonzero(self._goal) < 2 or not self.left or most < 1 or (budget is not None and budget <= 0):
            return []
        start = np.inf
        if len(self._at_hand):
            start = self._at_hand.losses.min(axis=0)
        elif len(self.left) > most:
            return []
        tasks, lengths = np.array(self.left), np.sort(self._estimator.lengths)
        weights = np.eye(len(self._goal))[tasks]
        each, needed = [np.full(len(tasks), length) for length in lengths], weights > 0
        losses = np.stack([self._estimator.predict(weights, needed=needed, lengths=own).loss[needed] for own in each])
        costs = np.stack([self._estimator.training_cost(weights, own) for own in each])
        before = np.broadcast_to(start, len(self._goal))[tasks]
        steps = [
            (*step, column)
            for column, task in enumerate(tasks.tolist())
            for step in _hull(self._goal[task], before[column], losses[:, column], costs[:, column])
        ]
        steps.sort(key=lambda step: (-step[0], step[2]))
        largest = np.argsort(-self._goal[tasks] * (np.minimum(before, NO_LOSS) - losses.min(axis=0)), kind="stable")
        found = _greedy(steps, costs, most, budget)
        if most < len(tasks):
            found += _greedy([step for step in steps if step[2] in largest[:most]], costs, most, budget)
        if not len(self._at_hand):
            found = [taken for taken in found if (taken >= 0).all()]
        known = [(len(one), one.lengths.tolist()) for one in self.every(most, budget)]
        sets = [self._set(tasks[own >= 0], lengths[own[own >= 0]]) for own in found]
        return pareto([one for one in sets if (len(one), one.lengths.tolist()) not in known], self._goal)

    def _set(self, tasks: np.ndarray, lengths: np.ndarray) -> MixtureSet:
        """Each of the tasks, and those trained alone already, are served by their own adapters, whatever they lose."""
        weights, columns = np.eye(len(self._goal))[tasks], np.arange(len(self._goal))
        needed = weights > 0 if len(self._at_hand) else None
        losses = self._estimator.predict(weights, needed=needed, lengths=lengths).loss
        if len(self._at_hand):
            serving = -1 - self._at_hand.losses.argmin(axis=0)
            loss = self._at_hand.losses[-1 - serving, columns]
        else:
            serving = losses.argmin(axis=0)
            loss = losses[serving, columns]
        serving[tasks], loss[tasks] = np.arange(len(tasks)), losses[np.arange(len(tasks)), tasks]
        for task, row in self._trained.items():
            serving[task], loss[task] = -1 - row, self._at_hand.losses[row, task]
        return MixtureSet(weights, loss, serving, float(self._estimator.training_cost(weights, lengths).sum()), lengths)


def _greedy(
    steps: list[tuple[float, int, int]], costs: np.ndarray, most: int, budget: float | None
) -> list[np.ndarray]:
    """The row of `costs` `(L, C)` that is taken for each column, or -1, `(C,)`, after some of the steps in turn."""
    taken, found, spent = np.full(costs.shape[1], -1), [], 0.0
    for _, place, column in steps:
        is_new = taken[column] < 0
        cost = costs[place, column] - (0.0 if is_new else costs[taken[column], column])
        if (budget is not None and spent + cost > budget + 1e-9) or (is_new and (taken >= 0).sum() >= most):
            continue
        taken[column] = place
        spent += cost
        found.append(taken.copy())
    if len(found) > _MAX_SETS:
        found = [found[place] for place in np.linspace(0, len(found) - 1, _MAX_SETS).round().astype(int)]
    return found


def _hull(weight: float, before: float, losses: np.ndarray, costs: np.ndarray) -> list[tuple[float, int]]:
    """Steps of one task from length to length, each with its gain by cost, which falls from step to step."""
    found: list[tuple[float, int]] = []
    loss, cost, place = min(before, NO_LOSS), 0.0, -1
    while place + 1 < len(losses):
        later = np.arange(place + 1, len(losses))
        ratios = weight * (loss - losses[later]) / np.maximum(costs[later] - cost, 1e-12)
        best = int(later[np.argmax(ratios)])
        if ratios.max() <= 0:
            break
        found.append((float(ratios.max()), best))
        loss, cost, place = losses[best], costs[best], best
    return found
