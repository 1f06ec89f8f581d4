"""How far predicted losses of chosen mixtures are to be believed: a minimum over many predictions is too low."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...estimate import SubsetEstimator
from .adapters_at_hand import AdaptersAtHand
from .mixture_search import MixtureSet

# Normal quantile: at 90 %, a difference within this many standard errors of zero may be due to chance.
CLOSE = 1.645

Search = Callable[[SubsetEstimator, AdaptersAtHand], list[MixtureSet]]


@dataclass(frozen=True)
class CostPoint:
    """What a set of mixtures costs, and what it is worth.

    Args:
        cost (`float`): of training the mixtures, in multiples of one adapter for all.
        num_groups (`int`): number of mixtures.
        predicted_loss (`float`): mean predicted loss.
        optimism (`float`): what the search has made of the noise of the validation rows.
        difference (`float`): predicted loss plus optimism, minus the loss of one adapter for all.
        error (`float`): standard error of this difference over the validation rows.
    """

    cost: float
    num_groups: int
    predicted_loss: float
    optimism: float
    difference: float
    error: float

    @property
    def expected_loss(self) -> float:
        """The loss with the difference from one adapter for all shrunk by its error, towards none.

        A gain d with the standard error s counts as d max(0, 1 - s^2 / d^2) (positive-part shrinkage, Efron and Morris
        1973).
        """
        together = self.predicted_loss + self.optimism - self.difference
        if self.difference >= 0:
            return together + self.difference
        return together + self.difference * max(0.0, 1 - (self.error / self.difference) ** 2)


class SetComparison:
    """Standard errors of differences between sets of mixtures, over the validation rows.

    Args:
        estimator (`SubsetEstimator`): makes the predictions.
        at_hand (`AdaptersAtHand`): adapters that serve tasks besides.
        goal (`np.ndarray` of shape `(T,)`): weight of each task's loss.
    """

    def __init__(self, estimator: SubsetEstimator, at_hand: AdaptersAtHand, goal: np.ndarray):
        self._estimator, self._at_hand, self._goal = estimator, at_hand, goal
        self._optima: dict[bytes, np.ndarray] = {}

    def served(self, found: MixtureSet) -> tuple[np.ndarray, np.ndarray]:
        """Optima `(m + f, k)` of the mixtures and of the adapters at hand, and the one that serves each task `(T,)`."""
        key = found.weights.tobytes() + found.lengths.tobytes()
        if key not in self._optima:
            optima = self._at_hand.optima
            if len(found):
                mixtures = found.weights / self._estimator.sampling_weights
                predicted = self._estimator.predict(mixtures, lengths=found.lengths)
                optima = np.concatenate([predicted.coefficients, optima])
            self._optima[key] = optima
        return self._optima[key], np.where(found.serving >= 0, found.serving, len(found) - 1 - found.serving)

    def between(self, one: MixtureSet, other: MixtureSet) -> float:
        """Of the weighted difference between the losses of two sets."""
        return self._error(self.served(one), self.served(other))

    def from_one_adapter(self, one: MixtureSet, optimum: np.ndarray) -> float:
        """Of the weighted difference between the losses of a set and of one adapter `(k,)` for all tasks."""
        return self._error(self.served(one), (optimum[None], np.zeros(len(self._goal), dtype=int)))

    def _error(self, one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> float:
        variance = 0.0
        serving = np.stack([one[1], other[1]], axis=1)
        for first, second in np.unique(serving, axis=0):
            weights = np.where((serving == (first, second)).all(axis=1), self._goal, 0.0)
            spread = self._estimator.score_spread(one[0][first][None], other[0][second], weights)
            variance += float(spread[0]) ** 2
        return variance**0.5


def cost_points(
    estimator: SubsetEstimator,
    rough: SubsetEstimator,
    at_hand: AdaptersAtHand,
    goal: np.ndarray,
    families: Sequence[tuple[Sequence[MixtureSet], Search | None]],
) -> list[tuple[MixtureSet, CostPoint]]:
    """Sets by cost, with what each is worth without what the search has made of noise.

    A family's whole search is repeated on either half of the validation rows. What it finds there for a cost, mixtures,
    their number and who is served by which, is scored on the other half: the loss is higher than on its own half by the
    optimism. That of all rows is smaller by the root of two, as the noise is.

    Args:
        estimator (`SubsetEstimator`): makes the predictions.
        rough (`SubsetEstimator`): makes those that the search looks at, from all rows or a sample.
        at_hand (`AdaptersAtHand`): adapters that serve tasks besides.
        goal (`np.ndarray` of shape `(T,)`): weight of each task's loss.
        families (`Sequence[tuple[Sequence[MixtureSet], Callable]]`):
            Sets that a search has found on all rows, by cost, and this search, for an estimator and the adapters at
            hand; `None` in its place for sets that no validation row has chosen.
            Scales of outputs are those of the rows that are scored, as for the one adapter for all.
    """
    comparison = SetComparison(estimator, at_hand, goal)
    together = estimator.predict(np.ones((1, len(goal))))
    optimum = at_hand.one_for_all_optimum(together)
    loss_together = float(goal @ at_hand.one_for_all_loss(together))
    halves = [(own, at_hand.on(own)) for own in rough.halves()]
    points = []
    for sets, search in families:
        optimism = np.zeros(len(sets))
        if search is not None and any(map(len, sets)):
            optimism = np.maximum.accumulate(np.maximum(_optimism(halves, sets, goal, search), 0.0))
        for one, own in zip(sets, optimism.tolist()):
            loss = float(goal @ one.loss)
            # Nothing was searched for where nothing is trained but what is there.
            own = own if len(one) or len(at_hand) > 1 else 0.0
            difference = loss + own - loss_together
            error = comparison.from_one_adapter(one, optimum)
            points.append((one, CostPoint(one.cost, len(one), loss, own, difference, error)))
    return sorted(points, key=lambda pair: pair[0].cost)


def _optimism(
    halves: Sequence[tuple[SubsetEstimator, AdaptersAtHand]],
    sets: Sequence[MixtureSet],
    goal: np.ndarray,
    search: Search,
) -> np.ndarray:
    """Optimism at the cost of each set."""
    total = np.zeros(len(sets))
    for (own, at_hand), (other, elsewhere) in (halves, halves[::-1]):
        front = search(own, at_hand)
        if not front:
            # Nothing is worth its cost there.
            continue
        comparison = SetComparison(own, at_hand, goal)
        costs = np.array([one.cost for one in front])
        places = np.maximum(np.searchsorted(costs, [one.cost + 1e-9 for one in sets], side="right") - 1, 0)
        gaps = {}
        for place in np.unique(places).tolist():
            optima, serving = comparison.served(front[place])
            losses = other.loss_at(optima)
            losses[len(front[place]) :] = elsewhere.losses
            gaps[place] = float(goal @ (losses[serving, np.arange(len(goal))] - front[place].loss))
        total += [gaps[place] / 2 for place in places.tolist()]
    return total / np.sqrt(2)
