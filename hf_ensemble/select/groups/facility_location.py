"""Which of many facilities to open, each client being served by the open one that is best for it."""

from collections.abc import Sequence

import numpy as np

# Stands for the loss of a client that nothing serves.
NO_LOSS = 1e3
# Least decrease of the objective of a step: anything less is rounding.
_MIN_GAIN = 1e-9


class FacilityLocation:
    """The loss of clients served by their best facility, plus the price of what the open facilities cost:

        sum_t goal_t min(at_hand_t, min_{j open} loss_jt) + price sum_{j open} cost_j

    Args:
        losses (`np.ndarray` of shape `(P, T)`): loss of each client with each facility.
        costs (`np.ndarray` of shape `(P,)`): cost of each facility.
        goal (`np.ndarray` of shape `(T,)`): weight of each client's loss.
        at_hand (`np.ndarray` of shape `(T,)`): loss of each client without a facility; infinite where there is none.
        max_open (`int`): maximum number of open facilities.
    """

    def __init__(self, losses: np.ndarray, costs: np.ndarray, goal: np.ndarray, at_hand: np.ndarray, max_open: int):
        self.losses, self.costs, self.goal, self.max_open = losses, costs, goal, max_open
        self.at_hand = np.minimum(at_hand, NO_LOSS)

    def value(self, opened: Sequence[int], price: float) -> float:
        """The objective."""
        opened = list(opened)
        loss = np.vstack([self.losses[opened], self.at_hand]).min(axis=0)
        return float(self.goal @ loss) + price * float(self.costs[opened].sum())

    def search(self, opened: Sequence[int], price: float, max_cost: float = np.inf) -> list[int]:
        """A local optimum: no facility can be added, dropped or exchanged to lower the objective.

        All exchanges are evaluated at once, from the losses with the best and the second best open facility (Whitaker
        1983, A fast algorithm for the greedy interchange for large-scale clustering and median location problems).

        Args:
            opened (`Sequence[int]`): where to start.
            price (`float`): of a unit of cost.
            max_cost (`float`, *optional*): maximum cost of all open facilities; that of the start is not above it.
        """
        opened, value = list(opened), self.value(opened, price)
        while True:
            found, changed = self._best_step(opened, price, max_cost)
            if found >= value - _MIN_GAIN:
                return opened
            value, opened = found, sorted(changed)

    def _best_step(self, opened: list[int], price: float, max_cost: float) -> tuple[float, list[int]]:
        rows = np.vstack([self.losses[opened], self.at_hand])
        order = np.argsort(rows, axis=0, kind="stable")
        serving, tasks = order[0], np.arange(len(self.goal))
        first = rows[serving, tasks]
        second = rows[order[1], tasks] if len(rows) > 1 else np.full(len(tasks), NO_LOSS)
        spent = float(self.costs[opened].sum())
        with_new = np.minimum(first, self.losses)
        added = with_new @ self.goal + price * (self.costs + spent)
        added[self.costs + spent > max_cost] = np.inf
        options = [(np.inf, opened)]
        if len(opened) < self.max_open:
            best = int(np.argmin(added))
            options.append((float(added[best]), [*opened, best]))
        if opened:
            # What the clients of each open facility lose without it, for each facility that may take its place.
            own = (serving == np.arange(len(opened))[:, None]) * self.goal
            exchanged = (with_new @ self.goal)[:, None] + (np.minimum(second, self.losses) - with_new) @ own.T
            cost = self.costs[:, None] + spent - self.costs[opened]
            exchanged = np.where(cost > max_cost, np.inf, exchanged + price * cost)
            best, place = np.unravel_index(int(np.argmin(exchanged)), exchanged.shape)
            rest = [index for row, index in enumerate(opened) if row != place]
            options.append((float(exchanged[best, place]), [*rest, int(best)]))
            dropped = self.goal @ first + own @ (second - first) + price * (spent - self.costs[opened])
            place = int(np.argmin(dropped))
            options.append((float(dropped[place]), [index for row, index in enumerate(opened) if row != place]))
        return min(options, key=lambda option: option[0])
