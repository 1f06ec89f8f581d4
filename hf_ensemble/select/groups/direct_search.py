"""Local search for a partition of the tasks with a small predicted loss: merges, then moves and swaps.

A group is a boolean mask over the tasks; its loss is the sum of its tasks' losses when the group trains together.
"""

from collections.abc import Iterable

import numpy as np

from .group_losses import GroupLosses, group_masks
from .partition import canonical

# Minimum gain of a step, relative to the loss of all groups: anything less is solver error.
_MIN_GAIN = 1e-6
# Number of changes that are predicted at once where they are ranked by estimates.
_NUM_PREDICTED = 32


def add_helpers(
    losses: GroupLosses, labels: np.ndarray, trained: np.ndarray, directions: np.ndarray, num_candidates: int
) -> np.ndarray:
    """Greedily add tasks of other groups to what each group trains on, as long as its own tasks gain.

    Args:
        losses (`GroupLosses`): losses of groups.
        labels (`np.ndarray` of shape `(T,)`): the partition.
        trained (`np.ndarray` of shape `(G, T)`): what each group trains on, including its own tasks.
        directions (`np.ndarray` of shape `(T, k)`): gradient direction of each task.
        num_candidates (`int`): number of tasks tried in each step, those with the most similar directions.

    Returns:
        `np.ndarray` of shape `(G, T)`: masks.
    """
    trained = trained.copy()
    vectors = _normalized(directions)
    for group, mask in enumerate(group_masks(labels)):
        best = float(losses([mask], [trained[group]])[0])
        alike = vectors @ vectors[mask].sum(axis=0)
        while True:
            outside = np.flatnonzero(~trained[group])
            tried = outside[np.argsort(-alike[outside], kind="stable")[:num_candidates]]
            if not len(tried):
                break
            larger = np.repeat(trained[group][None], len(tried), axis=0)
            larger[np.arange(len(tried)), tried] = True
            found = losses([mask] * len(tried), larger)
            winner = int(np.argmin(found))
            if best - found[winner] < _MIN_GAIN * best:
                break
            best, trained[group] = float(found[winner]), larger[winner]
    return trained


def merge_path(
    losses: GroupLosses, directions: np.ndarray, num_candidates: int, min_groups: int = 1
) -> list[tuple[np.ndarray, float]]:
    """Partitions into T, T - 1, ..., `min_groups` groups, each by the cheapest merge of the previous one.

    Each group is only tried with the `num_candidates` groups whose summed directions have the largest cosine with its
    own. From a hundred groups on, the cheapest 2 % of the merges are made before new ones are tried.

    Args:
        losses (`GroupLosses`): losses of groups.
        directions (`np.ndarray` of shape `(T, k)`): gradient direction of each task.
        num_candidates (`int`): number of groups each group is tried with; the search is exhaustive from T - 1 on.
        min_groups (`int`, *optional*, defaults to 1): where to stop.

    Returns:
        `list[tuple[np.ndarray, float]]`: labels `(T,)` of each partition and the sum of its groups' losses.
    """
    size = len(directions)
    masks = dict(enumerate(np.eye(size, dtype=bool)))
    sums = dict(enumerate(_normalized(directions)))
    own = dict(enumerate(losses(masks.values())))
    path = [(np.arange(size), sum(own.values()))]
    costs: dict[tuple[int, int], float] = {}

    def try_with(groups: Iterable[int]) -> None:
        present = np.array(list(masks))
        vectors = _normalized(np.stack([sums[other] for other in present]))
        pairs = set()
        for group in groups:
            alike = vectors @ (sums[group] / max(np.linalg.norm(sums[group]), 1e-12))
            alike[present == group] = -np.inf
            nearest = present[np.argsort(-alike, kind="stable")[: min(num_candidates, len(present) - 1)]]
            pairs |= {(min(group, other), max(group, other)) for other in nearest.tolist()}
        pairs = sorted(pairs - costs.keys())
        merged = losses(masks[first] | masks[second] for first, second in pairs)
        costs.update((pair, total - own[pair[0]] - own[pair[1]]) for pair, total in zip(pairs, merged))

    unused = size
    new: Iterable[int] = range(size)
    while len(masks) > min_groups:
        try_with(new)
        if not costs:
            try_with(list(masks))
        new = []
        for first, second in _cheapest(costs, min(max(1, len(masks) // 50), len(masks) - min_groups)):
            own[unused] = own.pop(first) + own.pop(second) + costs[first, second]
            masks[unused], sums[unused] = masks.pop(first) | masks.pop(second), sums.pop(first) + sums.pop(second)
            new.append(unused)
            unused += 1
            path.append((_labels(masks.values()), sum(own.values())))
        costs = {pair: cost for pair, cost in costs.items() if pair[0] in masks and pair[1] in masks}
    return path


def _cheapest(costs: dict[tuple[int, int], float], count: int) -> list[tuple[int, int]]:
    """At most `count` disjoint pairs, cheapest first; ties go to the first pair."""
    chosen: list[tuple[int, int]] = []
    used: set[int] = set()
    for pair in sorted(costs, key=lambda pair: (costs[pair], pair)):
        if not used & set(pair):
            chosen.append(pair)
            used |= set(pair)
            if len(chosen) == count:
                break
    return chosen


def improve_partition(
    losses: GroupLosses, labels: np.ndarray, directions: np.ndarray, num_candidates: int, max_rounds: int = 50
) -> np.ndarray:
    """Move single tasks to other groups and swap pairs of tasks as long as this lowers the loss.

    Each round tries to move every task to each of the `num_candidates` groups with the most similar directions, and, if
    no move gains, to swap it with each of the `num_candidates` most similar tasks of other groups. The best changes
    that touch disjoint groups are made, so that each gains what was predicted. Groups are never emptied.

    Args:
        losses (`GroupLosses`): losses of groups.
        labels (`np.ndarray` of shape `(T,)`): the initial partition.
        directions (`np.ndarray` of shape `(T, k)`): gradient direction of each task.
        num_candidates (`int`): see above.
        max_rounds (`int`, *optional*, defaults to 50): maximum number of rounds.

    Returns:
        `np.ndarray` of shape `(T,)`: labels of a partition with the same number of groups and no larger loss.
    """
    labels = canonical(labels)
    vectors = _normalized(directions)
    for _ in range(max_rounds):
        moved = _step(losses, labels, _moves(labels, vectors, num_candidates))
        if not moved and not _step(losses, labels, _swaps(labels, vectors, num_candidates)):
            break
    return canonical(labels)


# Tasks that change their group, each with its new group.
Change = list[tuple[int, int]]


def _step(losses: GroupLosses, labels: np.ndarray, changes: list[Change]) -> bool:
    """Make the best changes that touch no group twice, or many at once; returns whether there were any.

    Where predicting every change takes long, changes are ranked by estimates: as many of the best as gain together are
    made at once, and near the optimum, single ones are predicted as far down the ranking as any may still gain.
    """
    if not changes:
        return False
    masks = group_masks(labels)
    least = _MIN_GAIN * float(losses(masks).sum())
    if not losses.is_slow(after for change in changes for after in _changed_groups(masks, labels, change).values()):
        return _make(labels, changes, _gains(losses, masks, labels, changes), least)
    estimated = _estimated_gains(losses, masks, labels, changes)
    ranked = np.argsort(-estimated, kind="stable")
    if _make_many(losses, masks, labels, [changes[index] for index in ranked], estimated[ranked], least):
        return True
    gains = np.full(len(changes), -np.inf)
    chosen = ranked[:_NUM_PREDICTED]
    while len(chosen):
        gains[chosen] = _gains(losses, masks, labels, [changes[index] for index in chosen])
        if (gains > least).any():
            return _make(labels, changes, gains, least)
        known = np.isfinite(gains)
        error = np.abs(gains[known] - estimated[known]).max()
        chosen = ranked[~known[ranked] & (estimated[ranked] + error > least)][:_NUM_PREDICTED]
    return False


def _changed_groups(masks: np.ndarray, labels: np.ndarray, change: Change) -> dict[int, np.ndarray]:
    """Masks of the groups that a change touches, after it."""
    after: dict[int, np.ndarray] = {}
    for task, group in change:
        for changed, value in ((int(labels[task]), False), (group, True)):
            after.setdefault(changed, masks[changed].copy())[task] = value
    return after


def _gains(losses: GroupLosses, masks: np.ndarray, labels: np.ndarray, changes: list[Change]) -> np.ndarray:
    """By how much each change lowers the loss."""
    present = losses(masks)
    after = [_changed_groups(masks, labels, change) for change in changes]
    totals = iter(losses(mask for groups in after for mask in groups.values()))
    return np.array([sum(present[group] - next(totals) for group in groups) for groups in after])


def _estimated_gains(losses: GroupLosses, masks: np.ndarray, labels: np.ndarray, changes: list[Change]) -> np.ndarray:
    """[`_gains`], from estimates for single tasks that are added up."""
    toggled: dict[int, set[int]] = {}
    for change in changes:
        for task, group in change:
            for touched in (int(labels[task]), group):
                toggled.setdefault(touched, set()).add(task)
    rises = {group: losses.estimated_rises(masks[group], sorted(tasks)) for group, tasks in toggled.items()}
    return np.array(
        [-sum(rises[int(labels[task])][task] + rises[group][task] for task, group in change) for change in changes]
    )


def _make(labels: np.ndarray, changes: list[Change], gains: np.ndarray, least: float) -> bool:
    """Make the changes with the largest gains that touch no group twice."""
    used: set[int] = set()
    for index in np.argsort(-gains, kind="stable"):
        if gains[index] <= least:
            break
        touched = {group for task, new in changes[index] for group in (int(labels[task]), new)}
        if not used & touched:
            used |= touched
            for task, group in changes[index]:
                labels[task] = group
    return bool(used)


def _make_many(
    losses: GroupLosses,
    masks: np.ndarray,
    labels: np.ndarray,
    changes: list[Change],
    estimated: np.ndarray,
    least: float,
) -> bool:
    """Make the first changes, as many as together gain half of what they are estimated to; none for less than four."""
    moved: set[int] = set()
    chosen, hoped = [], []
    sizes = np.bincount(labels)
    for change, gain in zip(changes, estimated):
        if gain <= least:
            break
        tasks = {task for task, _ in change}
        # A group is never emptied.
        if not moved & tasks and (len(change) > 1 or sizes[labels[change[0][0]]] > 1):
            if len(change) == 1:
                sizes[labels[change[0][0]]] -= 1
            moved |= tasks
            chosen.append(change)
            hoped.append(gain)
    count, before = len(chosen), float(losses(masks).sum())
    while count >= 4:
        after = labels.copy()
        for change in chosen[:count]:
            for task, group in change:
                after[task] = group
        gain = before - losses.of_partition(after)
        if gain > max(least, 0.5 * sum(hoped[:count])):
            labels[:] = after
            return True
        count //= 2
    return False


def _moves(labels: np.ndarray, vectors: np.ndarray, num_candidates: int) -> list[Change]:
    count = labels.max() + 1
    sums = _normalized(np.stack([vectors[labels == group].sum(axis=0) for group in range(count)]))
    alike = vectors @ sums.T
    alike[np.arange(len(labels)), labels] = -np.inf
    nearest = np.argsort(-alike, axis=1, kind="stable")[:, : min(num_candidates, count - 1)]
    sizes = np.bincount(labels)
    return [[(task, int(group))] for task in range(len(labels)) if sizes[labels[task]] > 1 for group in nearest[task]]


def _swaps(labels: np.ndarray, vectors: np.ndarray, num_candidates: int) -> list[Change]:
    alike = vectors @ vectors.T
    alike[labels[:, None] == labels] = -np.inf
    nearest = np.argsort(-alike, axis=1, kind="stable")[:, :num_candidates]
    pairs = {
        (min(task, other), max(task, other))
        for task, others in enumerate(nearest.tolist())
        for other in others
        if labels[task] != labels[other]
    }
    return [[(first, int(labels[second])), (second, int(labels[first]))] for first, second in sorted(pairs)]


def _normalized(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _labels(masks: Iterable[np.ndarray]) -> np.ndarray:
    return canonical(np.argmax(np.stack(list(masks)), axis=0))
