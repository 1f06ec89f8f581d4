"""Search for a few mixtures of all tasks, each task served by the one that is best for it.

With L_t(a) the predicted loss of task t after a training on the mixture a, and c(a) the cost of this training, minimize

    sum_t goal_t min_j L_t(a_j)    subject to    sum_j c(a_j) <= budget

A partition is the special case of mixtures whose weights are 0 or 1 and do not overlap. The search generates columns:
it chooses from a pool of mixtures, which is a facility location problem, improves what it has chosen for the tasks that
it serves, and adds the results to the pool. A price on cost takes the place of the budget.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from ...estimate import SubsetEstimator

# Principal components that mixtures are improved in; whatever is chosen is predicted in all of them.
_NUM_COMPONENTS = 150
# Tasks with a smaller weight are dropped.
_MIN_WEIGHT = 1e-2
# Up to this number of tasks, each also gets a mixture of its own to choose from.
MAX_ALONE = 40
# Prices at which mixtures are generated, in shares of what a mixture for each task gains in all.
_PRICES = (0.5, 0.15, 0.05, 0.015)
_NUM_ROUNDS = 2
# Prices at which the final sets are chosen from the pool.
_NUM_PRICES = 30
# Sets that the local search for a set starts from.
_NUM_STARTS = 3
# Stands for the loss of a task that no mixture serves.
_NO_LOSS = 1e3


@dataclass(frozen=True)
class MixtureSet:
    """Mixtures that are trained, and which of them serves each task.

    Args:
        weights (`np.ndarray` of shape `(m, T)`): weight of a row of each task; the largest of each mixture is 1.
        loss (`np.ndarray` of shape `(T,)`): predicted loss of each task under the mixture that serves it.
        serving (`np.ndarray` of shape `(T,)`): this mixture's index; -1 stands for the baseline.
        cost (`float`): cost of training the mixtures, in multiples of a training on all tasks.
    """

    weights: np.ndarray
    loss: np.ndarray
    serving: np.ndarray
    cost: float

    def __len__(self) -> int:
        return len(self.weights)


class MixturePool:
    """Mixtures with their predicted losses and costs, to choose from.

    Args:
        estimator (`SubsetEstimator`): makes the predictions.
        goal (`np.ndarray` of shape `(T,)`): weight of each task's loss.
        baseline (`np.ndarray` of shape `(T,)`, *optional*):
            Losses with an adapter that is trained anyway, and that may serve tasks at no further cost.
        max_mixtures (`int`): maximum number of mixtures that are trained besides.
    """

    def __init__(self, estimator: SubsetEstimator, goal: np.ndarray, baseline: np.ndarray | None, max_mixtures: int):
        self._estimator, self.goal, self._max_mixtures = estimator, goal, max_mixtures
        self._sampling = estimator.sampling_weights / estimator.sampling_weights.max()
        size = len(goal)
        self.weights, self.losses, self.costs = np.zeros((0, size)), np.zeros((0, size)), np.zeros(0)
        self._sets: list[list[int]] = []
        self._at_hand = np.full(size, np.inf) if baseline is None else baseline
        if baseline is not None:
            self._sets.append([])
        self.add(np.eye(size))
        self.add(self._sampling[None])

    def _predicted(self, weights: np.ndarray) -> np.ndarray:
        return self._estimator.predict(weights / self._estimator.sampling_weights).loss

    def add(self, weights: np.ndarray) -> None:
        """Add mixtures of row weights `(m, T)`, and the set of all of them where there are not too many."""
        self.weights = np.vstack([self.weights, weights])
        self.losses = np.vstack([self.losses, self._predicted(weights)])
        costs = self._estimator.training_cost(weights / self._estimator.sampling_weights)
        self.costs = np.concatenate([self.costs, costs])
        if len(weights) <= self._max_mixtures:
            self._sets.append(list(range(len(self.costs) - len(weights), len(self.costs))))

    def chosen(self, price: float) -> MixtureSet:
        """The mixtures with the least weighted loss plus price times cost that a local search finds.

        It adds, drops and exchanges single mixtures, from none and from the best sets that are known.
        """
        starts = sorted(self._sets, key=lambda own: self._value(own, price))[:_NUM_STARTS]
        found = [self._searched(start, price) for start in [[], *starts]]
        taken = min(found, key=lambda own: self._value(own, price))
        if taken not in self._sets:
            self._sets.append(taken)
        return self._serving(np.array(taken, dtype=int))

    def _value(self, taken: Sequence[int], price: float) -> float:
        loss = np.vstack([self.losses[list(taken)], self._at_hand]).min(axis=0)
        return float(self.goal @ np.minimum(loss, _NO_LOSS)) + price * float(self.costs[list(taken)].sum())

    def _searched(self, taken: Sequence[int], price: float) -> list[int]:
        """A local optimum from some mixtures."""
        taken, value = list(taken), self._value(taken, price)
        while True:
            options = [(value, taken)]
            # An exchange, or an addition.
            places: list[int | None] = [*range(len(taken))]
            places += [None] if len(taken) < self._max_mixtures else []
            for place in places:
                rest = [own for index, own in enumerate(taken) if index != place]
                options.append((self._value(rest, price), rest))
                left = np.vstack([self.losses[rest], self._at_hand]).min(axis=0)
                after = np.minimum(np.minimum(left, self.losses), _NO_LOSS) @ self.goal
                after += price * (self.costs + self.costs[rest].sum())
                best = int(np.argmin(after))
                options.append((float(after[best]), sorted([*rest, best])))
            found, changed = min(options, key=lambda option: option[0])
            if found >= value - 1e-9:
                return taken
            value, taken = found, changed

    def within(self, budget: float | None) -> list[MixtureSet]:
        """Sets of a cost of at most the budget, at many prices, that no other one betters in both cost and loss."""
        span = float(self.goal @ (self.losses.max(axis=0) - self.losses.min(axis=0)))
        for price in [0.0, *np.geomspace(1e-4, 1.0, _NUM_PRICES) * span]:
            self.chosen(price)
        sets = [self._serving(np.array(taken, dtype=int)) for taken in self._sets]
        sets = [one for one in sets if np.isfinite(one.loss).all()]
        return pareto([one for one in sets if budget is None or one.cost <= budget + 1e-9], self.goal)

    def _serving(self, taken: np.ndarray) -> MixtureSet:
        rows = np.vstack([self.losses[taken], self._at_hand])
        best = rows.argmin(axis=0)
        used = np.unique(best[best < len(taken)])
        position = np.full(len(taken) + 1, -1)
        position[used] = np.arange(len(used))
        kept = taken[used]
        return MixtureSet(self.weights[kept], rows.min(axis=0), position[best], float(self.costs[kept].sum()))


class MixtureSteps:
    """Improves mixtures for the tasks that they serve.

    Args:
        estimator (`SubsetEstimator`): makes the predictions.
        goal (`np.ndarray` of shape `(T,)`): weight of each task's loss.
        num_candidates (`int`): number of tasks, those with the steepest descent, whose weight a step may raise from 0.
        max_iterations (`int`): maximum number of L-BFGS-B iterations of a step.
    """

    def __init__(self, estimator: SubsetEstimator, goal: np.ndarray, num_candidates: int, max_iterations: int):
        self._estimator = estimator.truncated(_NUM_COMPONENTS)
        self._goal, self._num_candidates, self._max_iterations = goal, num_candidates, max_iterations
        self._row_cost = np.zeros(len(goal))
        if not estimator.has_fixed_steps:
            self._row_cost = estimator.training_cost(np.eye(len(goal)))

    def improved(self, served: np.ndarray, start: np.ndarray, price: float) -> np.ndarray:
        """A mixture `(T,)` with less weighted loss of the tasks in the mask `served` `(T,)` plus price times cost."""
        sensitivity = self._estimator.sensitivity(np.where(served, self._goal, 0.0))
        row_cost = price * self._row_cost

        def value(weights: np.ndarray) -> tuple[float, np.ndarray]:
            loss, gradient = sensitivity.to_weights(weights)
            return loss + row_cost @ weights, gradient + row_cost

        _, slope = value(start)
        outside = np.flatnonzero((start == 0) & (slope < 0))
        upper = (start > 0).astype(float)
        upper[outside[np.argsort(slope[outside], kind="stable")[: self._num_candidates]]] = 1.0
        lower = np.zeros(len(start))
        # Only ratios of weights matter: one is fixed, the largest among the tasks that are served.
        fixed = int(np.argmax(np.where(served, start, -1.0)))
        lower[fixed] = upper[fixed] = 1.0
        found = minimize(
            value,
            np.clip(start, lower, upper),
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(lower, upper)),
            options={"maxiter": self._max_iterations, "ftol": 1e-6},
        )
        return np.where(found.x < _MIN_WEIGHT, 0.0, found.x)


def search_mixtures(
    pool: MixturePool,
    steps: MixtureSteps,
    budget: float | None = None,
    starts: Sequence[np.ndarray] = (),
) -> list[MixtureSet]:
    """Sets of mixtures within a budget, by cost, none of which another one betters in both cost and loss.

    Args:
        pool (`MixturePool`): what to choose from; it grows.
        steps (`MixtureSteps`): improves what is chosen.
        budget (`float`, *optional*):
            Maximum cost of the mixtures, in multiples of a training on all tasks. No limit by default.
        starts (`Sequence[np.ndarray]`, *optional*): mixtures `(m, T)` to choose from besides.
    """
    size = len(pool.goal)
    for start in starts:
        pool.add(start)
    together = pool.losses[size]  # The mixture after each task's own.
    span = float(pool.goal @ (together - np.minimum(pool.losses.min(axis=0), together)))
    span = max(span, 0.02 * float(pool.goal @ together))
    if size <= MAX_ALONE:
        alone = np.eye(size)
        pool.add(np.stack([steps.improved(own > 0, own, _PRICES[-2] * span) for own in alone]))
    for price in _PRICES:
        _generate(pool, steps, price * span)
    sets = pool.within(budget)
    if budget is not None and len(sets) > 1:
        # The price at which the last set was worth its cost.
        paid = float(pool.goal @ (sets[-2].loss - sets[-1].loss)) / max(sets[-1].cost - sets[-2].cost, 1e-9)
        _generate(pool, steps, paid)
        sets = pool.within(budget)
    return sets


def _generate(pool: MixturePool, steps: MixtureSteps, price: float) -> None:
    for _ in range(_NUM_ROUNDS):
        chosen = pool.chosen(price)
        if not len(chosen):
            return
        pool.add(
            np.stack([steps.improved(chosen.serving == index, own, price) for index, own in enumerate(chosen.weights)])
        )


def pareto(sets: Iterable[MixtureSet], goal: np.ndarray) -> list[MixtureSet]:
    """Sets that no other one betters in both cost and loss, by cost."""
    front: list[MixtureSet] = []
    for one in sorted(sets, key=lambda one: (one.cost, float(goal @ one.loss))):
        if not front or goal @ one.loss < goal @ front[-1].loss - 1e-9:
            front.append(one)
    return front
