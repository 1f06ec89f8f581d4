"""Search for a few mixtures of all tasks, each task served by the one that is best for it.

With L_t(a, l) the predicted loss of task t after a training of length l on the mixture a, and c(a, l) the cost of this
training, minimize

    sum_t goal_t min_j L_t(a_j, l_j)    subject to    sum_j c(a_j, l_j) <= budget

A partition is the special case of mixtures whose weights are 0 or 1 and do not overlap. The search generates columns:
it chooses from a pool of mixtures, which is a facility location problem, improves what it has chosen for the tasks that
it serves, and adds the results to the pool. A price on cost takes the place of the budget. Mixtures are found at the
estimator's own length; where it knows others, those that are worth choosing join the pool at each of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ...estimate import SubsetEstimator
from .adapters_at_hand import AdaptersAtHand
from .facility_location import FacilityLocation
from .mixture_steps import MixtureSteps

# Prices at which mixtures are generated, in shares of what a mixture for each task gains in all.
_PRICES = (0.5, 0.15, 0.05, 0.015)
_NUM_ROUNDS = 2
# Rounds of improvement at the budget, which end where one gains less than this share of the loss.
_MAX_FINAL_ROUNDS, _LEAST_GAIN = 4, 1e-3
# Prices at which the final sets are chosen from the pool.
_NUM_PRICES = 24
# Sets that the local search for a set starts from.
_NUM_STARTS = 2
# Up to this number of tasks, each also gets a mixture of its own: of more, few would be chosen.
_MAX_ALONE = 150


@dataclass(frozen=True)
class MixtureSet:
    """Mixtures that are trained, and which of them serves each task.

    Args:
        weights (`np.ndarray` of shape `(m, T)`): weight of a row of each task; the largest of each mixture is 1.
        loss (`np.ndarray` of shape `(T,)`): predicted loss of each task under the mixture that serves it.
        serving (`np.ndarray` of shape `(T,)`): this mixture's index; -1 - i stands for the i-th adapter at hand.
        cost (`float`): cost of training the mixtures, in multiples of a training on all tasks.
        lengths (`np.ndarray` of shape `(m,)`): of the trainings, in multiples of a whole one.
    """

    weights: np.ndarray
    loss: np.ndarray
    serving: np.ndarray
    cost: float
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.weights)


class MixturePool:
    """Mixtures with their predicted losses and costs, to choose from.

    Args:
        estimator (`SubsetEstimator`): makes the predictions.
        goal (`np.ndarray` of shape `(T,)`): weight of each task's loss.
        at_hand (`np.ndarray` of shape `(f, T)`):
            Loss of each task with adapters that are trained anyway, or already, and that may serve tasks at no further
            cost.
        max_mixtures (`int`): maximum number of mixtures that are trained besides.
        is_empty (`bool`, *optional*, defaults to `False`):
            Whether there is nothing to choose from at first, in place of each task alone and all of them.
    """

    def __init__(
        self,
        estimator: SubsetEstimator,
        goal: np.ndarray,
        at_hand: np.ndarray,
        max_mixtures: int,
        is_empty: bool = False,
    ):
        self._estimator, self.goal, self._max_mixtures = estimator, goal, max_mixtures
        self._sampling = estimator.sampling_weights / estimator.sampling_weights.max()
        size = len(goal)
        self.weights, self.losses = np.zeros((0, size)), np.zeros((0, size))
        self.lengths, self.costs = np.zeros(0), np.zeros(0)
        self._places: dict[tuple[bytes, float], int] = {}
        self._sets: list[list[int]] = []
        self._at_hand = at_hand
        if len(at_hand):
            self._sets.append([])
        if not is_empty:
            self.add(np.eye(size))
            self.add(self._sampling[None])

    @property
    def has_lengths(self) -> bool:
        """Whether trainings may have several lengths."""
        return len(self._estimator.lengths) > 1

    @property
    def length_range(self) -> float:
        """How much longer a training is at the estimator's own length than at the shortest."""
        return self._estimator.length / min(self._estimator.lengths)

    @property
    def together(self) -> np.ndarray:
        """Losses of the training on all tasks, `(T,)`."""
        return self.losses[self._places[self._sampling.tobytes(), self._estimator.length]]

    def add(self, weights: np.ndarray, lengths: np.ndarray | None = None) -> None:
        """Add mixtures of row weights `(m, T)`, and the set of all of them where there are not too many.

        Their lengths `(m,)` are the estimator's own by default.
        """
        weights = np.ascontiguousarray(weights, dtype=np.float64)
        lengths = np.full(len(weights), self._estimator.length) if lengths is None else lengths
        keys = _keys(weights, lengths)
        new = {key: place for place, key in enumerate(keys) if key not in self._places}
        if new:
            rows = list(new.values())
            mixtures, lengths = weights[rows] / self._estimator.sampling_weights, lengths[rows]
            self._places |= {key: len(self.costs) + place for place, key in enumerate(new)}
            self.weights = np.vstack([self.weights, weights[rows]])
            self.lengths = np.concatenate([self.lengths, lengths])
            self.losses = np.vstack([self.losses, self._estimator.predict(mixtures, lengths=lengths).loss])
            self.costs = np.concatenate([self.costs, self._estimator.training_cost(mixtures, lengths)])
        places = sorted({self._places[key] for key in keys})
        if len(places) <= self._max_mixtures and places not in self._sets:
            self._sets.append(places)

    def _problem(self) -> FacilityLocation:
        at_hand = np.vstack([self._at_hand, np.full(len(self.goal), np.inf)]).min(axis=0)
        return FacilityLocation(self.losses, self.costs, self.goal, at_hand, self._max_mixtures)

    def chosen(self, price: float, max_cost: float = np.inf) -> MixtureSet:
        """The mixtures with the least weighted loss plus price times cost that a local search finds.

        It adds, drops and exchanges single mixtures, from none and from the best sets that are known.
        """
        problem = self._problem()
        known = [own for own in self._sets if self.costs[own].sum() <= max_cost]
        starts = sorted(known, key=lambda own: problem.value(own, price))[:_NUM_STARTS]
        found = [problem.search(start, price, max_cost) for start in [[], *starts]]
        taken = min(found, key=lambda own: problem.value(own, price))
        if taken not in self._sets:
            self._sets.append(taken)
        return self._serving(np.array(taken, dtype=int))

    def within(self, budget: float | None) -> list[MixtureSet]:
        """Sets of a cost of at most the budget, at many prices, that no other one betters in both cost and loss."""
        span = float(self.goal @ (self.losses.max(axis=0) - self.losses.min(axis=0)))
        for price in [0.0, *np.geomspace(1e-4, 1.0, _NUM_PRICES) * span]:
            self.chosen(price)
        if budget is not None:
            self.chosen(0.0, budget + 1e-9)
        sets = [self._serving(np.array(taken, dtype=int)) for taken in self._sets]
        sets = [one for one in sets if np.isfinite(one.loss).all()]
        return pareto([one for one in sets if budget is None or one.cost <= budget + 1e-9], self.goal)

    def add_lengths(self) -> None:
        """Add what may be worth choosing at every other length: what is chosen at some price, and single tasks."""
        chosen = [one.weights for one in self.within(None)]
        size = len(self.goal)
        alone = [np.eye(size)] if size <= _MAX_ALONE else []
        weights = np.unique(np.vstack([*chosen, *alone]), axis=0)
        for length in self._estimator.lengths[1:]:
            self.add(weights, np.full(len(weights), length))

    def served_by(self, weights: np.ndarray, lengths: np.ndarray) -> MixtureSet:
        """A set of mixtures of the pool, `(m, T)`, of some lengths `(m,)`."""
        return self._serving(np.array([self._places[key] for key in _keys(weights, lengths)], dtype=int))

    def _serving(self, taken: np.ndarray) -> MixtureSet:
        # An adapter at hand is taken where it is as good as a new one.
        rows = np.vstack([self._at_hand, self.losses[taken]])
        if not len(rows):
            nothing = np.full(len(self.goal), np.inf)
            nobody = np.full(len(self.goal), -1)
            return MixtureSet(self.weights[taken], nothing, nobody, 0.0, self.lengths[taken])
        best = rows.argmin(axis=0) - len(self._at_hand)
        used = np.unique(best[best >= 0])
        position = np.zeros(len(taken), dtype=int)
        position[used] = np.arange(len(used))
        kept = taken[used]
        serving = np.where(
            best >= 0, position[np.maximum(best, 0)] if len(taken) else 0, -1 - (best + len(self._at_hand))
        )
        cost = float(self.costs[kept].sum())
        return MixtureSet(self.weights[kept], rows.min(axis=0), serving, cost, self.lengths[kept])


def _keys(weights: np.ndarray, lengths: np.ndarray) -> list[tuple[bytes, float]]:
    return [(row.tobytes(), float(length)) for row, length in zip(weights, lengths)]


def search_mixtures(
    pool: MixturePool,
    steps: MixtureSteps,
    budget: float | None = None,
    starts: Sequence[np.ndarray] = (),
) -> tuple[list[MixtureSet], list[MixtureSet]]:
    """Sets of mixtures within a budget, by cost, none of which another one betters in both cost and loss.

    The first are those of trainings of the estimator's own length. Where it knows others, the second are of any length;
    else there are none. There is more to choose among these, so that they make more of the validation rows' noise.

    Args:
        pool (`MixturePool`): what to choose from; it grows.
        steps (`MixtureSteps`): improves what is chosen.
        budget (`float`, *optional*):
            Maximum cost of the mixtures, in multiples of a training on all tasks. No limit by default.
        starts (`Sequence[np.ndarray]`, *optional*): mixtures `(m, T)` to choose from besides.
    """
    for start in starts:
        pool.add(start)
    span = float(pool.goal @ (pool.together - np.minimum(pool.losses.min(axis=0), pool.together)))
    span = max(span, 0.02 * float(pool.goal @ pool.together))
    if len(pool.goal) <= _MAX_ALONE:
        pool.add(steps.alone(_PRICES[-2] * span))
    # Mixtures that cost too much at this length may be paid for at a shorter one.
    most = np.inf if budget is None else budget * pool.length_range
    for price in _PRICES:
        # At lower prices, still more is chosen than the budget pays for.
        if _generate(pool, steps, price * span) > most:
            break
    sets = _within(pool, steps, budget)
    if not pool.has_lengths:
        return sets, []
    pool.add_lengths()
    return sets, _within(pool, steps, budget)


def _within(pool: MixturePool, steps: MixtureSteps, budget: float | None) -> list[MixtureSet]:
    """The pool's best sets within a budget, where mixtures are improved for it as long as that helps."""
    sets = pool.within(budget)
    if budget is None:
        return sets
    for _ in range(_MAX_FINAL_ROUNDS):
        if len(sets) < 2:
            break
        last = float(pool.goal @ sets[-1].loss)
        # The price at which the last set was worth its cost.
        paid = (float(pool.goal @ sets[-2].loss) - last) / max(sets[-1].cost - sets[-2].cost, 1e-9)
        _generate(pool, steps, paid, budget + 1e-9)
        sets = pool.within(budget)
        if last - float(pool.goal @ sets[-1].loss) < _LEAST_GAIN * last:
            break
    return sets


def _generate(pool: MixturePool, steps: MixtureSteps, price: float, max_cost: float = np.inf) -> float:
    """Improve what is chosen at a price, several times; returns what it cost at last."""
    cost = 0.0
    for _ in range(_NUM_ROUNDS):
        chosen = pool.chosen(price, max_cost)
        cost = chosen.cost
        if not len(chosen):
            break
        pool.add(
            np.stack(
                [
                    steps.improved(chosen.serving == index, own, price, length)
                    for index, (own, length) in enumerate(zip(chosen.weights, chosen.lengths.tolist()))
                ]
            ),
            chosen.lengths,
        )
    return cost


def pareto(sets: Iterable[MixtureSet], goal: np.ndarray) -> list[MixtureSet]:
    """Sets that no other one betters in both cost and loss, by cost."""
    front: list[MixtureSet] = []
    for one in sorted(sets, key=lambda one: (one.cost, float(goal @ one.loss))):
        if not front or goal @ one.loss < goal @ front[-1].loss - 1e-9:
            front.append(one)
    return front


def predicted_sets(
    estimator: SubsetEstimator, at_hand: AdaptersAtHand, sets: Sequence[MixtureSet], goal: np.ndarray
) -> list[MixtureSet]:
    """Sets that were found by other predictions, with these, each task served by what is best for it by these.

    Mixtures that serve no task any more are left out, and so are sets that another one now betters.
    """
    pool = MixturePool(estimator, goal, at_hand.losses, len(goal), is_empty=True)
    if any(map(len, sets)):
        pool.add(np.vstack([one.weights for one in sets]), np.concatenate([one.lengths for one in sets]))
    return pareto([pool.served_by(one.weights, one.lengths) for one in sets], goal)
