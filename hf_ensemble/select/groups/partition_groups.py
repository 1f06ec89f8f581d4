"""Groups that partition the tasks."""

from collections.abc import Sequence

import numpy as np

from ..._text import counted
from ...estimate import SubsetEstimator
from ..settings import GroupingSettings
from .direct_search import add_helpers, improve_partition, merge_path
from .found_groups import FoundGroups
from .group_losses import GroupLosses, group_masks
from .partition import coclustering, semidefinite_partition, spectral_partition

# Number of partitions on the merge path, those with the least loss, that are improved when the number is chosen: one
# where the search looks at a sample of rows, of which as many are then predicted from all rows.
_NUM_IMPROVED = 3
# Maximum number of candidate numbers of groups for the methods that partition the affinity matrix: a semidefinite
# program over a hundred tasks takes seconds.
_MAX_COUNTS = {"spectral": 30, "coclustering": 30, "semidefinite": 8}


def partition_groups(
    estimator: SubsetEstimator,
    group_losses: GroupLosses,
    searched: GroupLosses,
    affinity: np.ndarray,
    settings: GroupingSettings,
    num_candidates: int,
    has_baseline: bool,
    seed: int,
) -> FoundGroups:
    """The best partition; the arguments are those of [`group_tasks`].

    `searched` are the losses that the search looks at. Where these are of a sample of rows, the best partitions by them
    are predicted from all rows.
    """
    names, directions = estimator.task_names, estimator.task_gradients()
    is_sampled = searched is not group_losses
    partitions = _partitions(searched, affinity, directions, settings, num_candidates, seed, is_sampled)
    if is_sampled:
        price = settings.group_cost * len(names)
        totals = [searched.of_partition(*partition) + price * len(partition[1]) for partition in partitions]
        partitions = [partitions[place] for place in np.argsort(totals, kind="stable")[:_NUM_IMPROVED]]
    losses = [group_losses.of_partition(labels, trained) / len(names) for labels, trained in partitions]
    sizes = [len(trained) for _, trained in partitions]
    best = int(np.argmin([loss + settings.group_cost * size for loss, size in zip(losses, sizes)]))
    curve: dict[str, float] = {}
    for size, loss in zip(sizes, losses):
        curve[str(size)] = min(loss, curve.get(str(size), np.inf))
    labels, trained = partitions[best]
    if settings.overlapping_groups:
        helped = add_helpers(searched, labels, trained, directions, num_candidates)
        # What helps by the rows that searches look at has to help by all of them.
        masks = group_masks(labels)
        gains = group_losses(masks, helped) < group_losses(masks, trained)
        trained = np.where(gains[:, None], helped, trained)
    num_helpers = int((trained & ~group_masks(labels)).sum())
    summary = _summary(settings, sizes[best], losses[best], len(losses))
    if num_helpers:
        with_help = group_losses.of_partition(labels, trained) / len(names)
        summary = f"{summary}; with {counted(num_helpers, 'helper')} it is {with_help:.4f}"
    mixtures = trained.astype(np.float64)
    baseline = None
    if has_baseline and settings.group_initialization == "fresh" and len(trained) == 1:
        # One group of everything is the adapter for all tasks.
        baseline, new = 0, mixtures[:0]
    else:
        new = mixtures
    cost = float(has_baseline) + float(estimator.training_cost(new).sum())
    group_names = [f"group_{row}" for row in range(len(mixtures))]
    lengths = np.full(len(mixtures), estimator.length)
    return FoundGroups(labels, mixtures, curve, cost, f"{summary}.", group_names, lengths, baseline)


def _summary(settings: GroupingSettings, num_groups: int, loss: float, num_partitions: int) -> str:
    found = counted(num_groups, "group")
    if settings.num_groups is not None:
        were = "was" if settings.num_groups == 1 else "were"
        return f"{counted(settings.num_groups, 'group')} {were} requested; the predicted loss of {found} is {loss:.4f}"
    have, partitions = "has" if num_groups == 1 else "have", counted(num_partitions, "partition")
    if settings.group_cost:
        return f"{found} {have} the least predicted loss plus group cost of {partitions}"
    return f"{found} {have} the least predicted loss, {loss:.4f}, of {partitions}"


def _partitions(
    losses: GroupLosses,
    affinity: np.ndarray,
    directions: np.ndarray,
    settings: GroupingSettings,
    num_candidates: int,
    seed: int,
    is_sampled: bool,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Candidate partitions: labels `(T,)` and what each group trains on, `(G, T)`."""
    method = settings.grouping_method
    max_groups = settings.max_groups or len(affinity)
    counts = [settings.num_groups] if settings.num_groups is not None else _counts(max_groups, method)
    if method == "direct":
        improved = 1 if is_sampled else _NUM_IMPROVED
        price = settings.group_cost * len(affinity)
        found = _direct_partitions(losses, affinity, directions, counts, price, num_candidates, seed, improved)
    elif method == "coclustering":
        return [coclustering(affinity, count, seed) for count in counts]
    elif method == "spectral":
        found = [spectral_partition(affinity, count, seed) for count in counts]
    else:
        found = [semidefinite_partition(affinity, count)[0] for count in counts]
        if settings.num_groups is None:
            proposed, _ = semidefinite_partition(affinity)
            found += [proposed] if proposed.max() < max_groups else []
    return [(labels, group_masks(labels)) for labels in found]


def _counts(max_groups: int, method: str) -> list[int]:
    """Numbers of groups to try."""
    if method == "direct" or max_groups <= max(_MAX_COUNTS.values()):
        return list(range(1, max_groups + 1))
    return sorted({int(round(count)) for count in np.geomspace(1, max_groups, _MAX_COUNTS[method])})


def _direct_partitions(
    losses: GroupLosses,
    affinity: np.ndarray,
    directions: np.ndarray,
    counts: Sequence[int],
    price: float,
    num_candidates: int,
    seed: int,
    num_improved: int,
) -> list[np.ndarray]:
    """Merge partitions, one per number of groups; the best are improved, from there and from spectral clusters."""
    path = {
        labels.max() + 1: (labels, loss)
        for labels, loss in merge_path(losses, directions, num_candidates, min_groups=min(counts))
    }
    found = []
    for rank, count in enumerate(sorted(counts, key=lambda count: path[count][1] + price * count)):
        labels = path[count][0]
        if rank < num_improved:
            starts = [labels, spectral_partition(affinity, count, seed)]
            labels = min(
                (improve_partition(losses, start, directions, num_candidates) for start in starts),
                key=losses.of_partition,
            )
        found.append(labels)
    return sorted(found, key=max)
