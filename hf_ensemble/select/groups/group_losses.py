"""Predicted losses of groups of tasks."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from ...estimate import SubsetEstimator

# Number of (group, task) pairs to predict from which on a search estimates first.
_SLOW = 5_000


class GroupPredictor(Protocol):
    """Where the losses come from."""

    def losses(self, trained: np.ndarray, members: np.ndarray) -> np.ndarray:
        """Losses of the tasks in the masks `members` when trained on the masks `trained`, all `(S, T)`."""

    def toggled(self, mask: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Approximate sum of the members' losses of a group `(T,)` with one task more or less, for each task `(C,)`."""


class EstimatedGroups:
    """Losses of groups by a [`SubsetEstimator`]."""

    def __init__(self, estimator: SubsetEstimator):
        self._estimator = estimator

    def losses(self, trained: np.ndarray, members: np.ndarray) -> np.ndarray:
        return self._estimator.predict(trained.astype(np.float64), needed=members).loss

    def toggled(self, mask: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        members = np.repeat(mask[None], len(tasks), axis=0)
        members[np.arange(len(tasks)), tasks] ^= True
        predicted = self._estimator.predict_toggled(mask, tasks, needed=members).loss
        return np.where(members, predicted, 0.0).sum(axis=1)


class GroupLosses:
    """Losses of groups, cached so that each is predicted once.

    Args:
        predict (`Callable` or [`GroupPredictor`]):
            Maps mixtures `(S, T)` of zeros and ones to the loss of every task, `(S, T)`; or an object that can also
            estimate.
    """

    def __init__(self, predict: Callable[[np.ndarray], np.ndarray] | GroupPredictor):
        self._predict = predict
        self._known: dict[bytes, float] = {}
        self._rises: dict[bytes, dict[int, float]] = {}

    def __call__(self, masks: Iterable[np.ndarray], trained: Iterable[np.ndarray] | None = None) -> np.ndarray:
        """Sum of the members' losses for each mask `(T,)`, trained on the members or on the masks in `trained`."""
        masks = list(masks)
        trained = masks if trained is None else list(trained)
        keys = [_key(mask, own) for mask, own in zip(masks, trained)]
        new = {key: row for row, key in enumerate(keys) if key not in self._known}
        if new:
            rows = list(new.values())
            members, groups = np.stack([masks[row] for row in rows]), np.stack([trained[row] for row in rows])
            if callable(self._predict):
                predicted = self._predict(groups.astype(np.float64))
            else:
                predicted = self._predict.losses(groups, members)
            totals = np.where(members, predicted, 0.0).sum(axis=1)
            self._known.update(zip(new, totals.tolist()))
        return np.array([self._known[key] for key in keys])

    def of_partition(self, labels: np.ndarray, trained: np.ndarray | None = None) -> float:
        """Sum over the groups of a partition `(T,)`; group g trains on `trained[g]` `(T,)` or on its own tasks."""
        return float(self(group_masks(labels), trained).sum())

    def is_slow(self, masks: Iterable[np.ndarray]) -> bool:
        """Whether predicting groups takes so long that [`estimated_rises`] should come first."""
        if callable(self._predict):
            return False
        new = {key: int(mask.sum()) for mask in masks if (key := _key(mask, mask)) not in self._known}
        return sum(new.values()) > _SLOW

    def estimated_rises(self, mask: np.ndarray, tasks: Sequence[int]) -> dict[int, float]:
        """By how much a group's loss rises with each task more, or less where it has the task; approximately."""
        known = self._rises.setdefault(mask.tobytes(), {})
        new = [task for task in tasks if task not in known]
        if new:
            rises = self._predict.toggled(mask, np.array(new)) - self([mask])[0]
            known.update(zip(new, rises.tolist()))
        return known


def _key(members: np.ndarray, trained: np.ndarray) -> bytes:
    return members.tobytes() + trained.tobytes()


def group_masks(labels: np.ndarray) -> np.ndarray:
    """The groups of a partition `(T,)` as masks `(G, T)`."""
    return labels == np.arange(labels.max() + 1)[:, None]
