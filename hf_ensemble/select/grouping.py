"""Which tasks belong together: n tasks into m groups."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from .._files import read_json, write_json
from ..errors import ConfigurationError
from ..estimate import SubsetEstimator
from .affinity import predicted_affinity
from .direct_search import GroupLosses, improved, members, merge_path, with_helpers
from .partition import coclustering, semidefinite_partition, spectral_partition
from .provenance import settings_of

GROUPING_METHODS = ("direct", "spectral", "semidefinite", "coclustering")
# Partitions of the merge path, those of least loss, that "auto" improves.
_NUM_IMPROVED = 3
# Numbers of groups that "auto" cuts the affinity matrix into, where there are more tasks: a semidefinite program of a
# hundred tasks takes seconds.
_MOST_COUNTS = {"spectral": 30, "coclustering": 30, "semidefinite": 8}
# Random partitions that a grouping is compared with.
_NUM_RANDOM = 10


@dataclass(frozen=True)
class Grouping:
    """A partition of the tasks, and why.

    Args:
        groups (`dict[str, list[str]]`): tasks of each group, by the group's name.
        method (`str`): `"direct"`, `"spectral"`, `"semidefinite"` or `"coclustering"`.
        task_names (`list[str]`): order of the affinity's rows.
        affinity (`list[list[float]]`): see [`predicted_affinity`].
        predicted_loss (`dict[str, float]`): mean predicted validation loss over the tasks, by the number of groups.
        why (`str`): one sentence.
        settings (`dict`): everything needed to make this grouping again from the same features.
        helpers (`dict[str, list[str]]`, *optional*):
            Tasks of other groups that a group trains on too, where groups may overlap.
        baselines (`dict[str, float]`, *optional*):
            Mean predicted loss with one group, with one group per task, and with as many groups at random.
    """

    groups: dict[str, list[str]]
    method: str
    task_names: list[str]
    affinity: list[list[float]]
    predicted_loss: dict[str, float]
    why: str
    settings: dict
    helpers: dict[str, list[str]] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)

    def group_of(self, task: str) -> str:
        return next(name for name, tasks in self.groups.items() if task in tasks)

    def trained_on(self, group: str) -> list[str]:
        """The tasks of a group and its helpers, in the order of all tasks."""
        held = {*self.groups[group], *self.helpers.get(group, ())}
        return [task for task in self.task_names if task in held]

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Grouping":
        return cls(**read_json(Path(path)))


def partition_loss(estimator: SubsetEstimator, groups: Sequence[Sequence[str]]) -> float:
    """Mean over tasks of the predicted loss under the group that holds the task."""
    prediction = estimator.predict_subsets(groups)
    index = {name: i for i, name in enumerate(estimator.task_names)}
    return float(np.mean([prediction.loss[row, index[task]] for row, group in enumerate(groups) for task in group]))


def group_tasks(
    estimator: SubsetEstimator,
    num_groups: int | str = "auto",
    method: str = "direct",
    max_groups: int | None = None,
    group_cost: float = 0.0,
    num_candidates: int = 10,
    overlap: bool = False,
    num_subsets: int = 400,
    subset_size: int | None = None,
    seed: int = 0,
) -> Grouping:
    """Partition the tasks so that those that help each other train together.

    `"direct"` lowers the predicted loss of the partition itself: groups are merged where it costs least, then tasks are
    moved and swapped, from there and from the spectral clusters. The other methods cut the affinity matrix;
    `"coclustering"` cuts tasks and helpers at once, see [`Grouping.helpers`].

    Args:
        estimator (`SubsetEstimator`): predictions.
        num_groups (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Groups. `"auto"` cuts the tasks into 1, 2, ... up to `max_groups` groups and keeps the cut with the least
            predicted loss and cost; the semidefinite program's own number, from its trace penalty, is among the
            candidates. Of more than 30 numbers, `"direct"` tries all, the other methods some, evenly spaced on a
            logarithmic scale.
        method (`str`, *optional*, defaults to `"direct"`):
            `"direct"`, `"spectral"`, `"semidefinite"` or `"coclustering"`.
        max_groups (`int`, *optional*): most groups that `"auto"` considers; the number of tasks by default.
        group_cost (`float`, *optional*, defaults to 0.0):
            By how much one more group has to lower the mean loss over the tasks, in nats, for `"auto"` to take it.
        num_candidates (`int`, *optional*, defaults to 10):
            Of `"direct"`: groups, or tasks of other groups, that each is tried with. From the number of tasks on every
            one is.
        overlap (`bool`, *optional*, defaults to `False`):
            Let a task help other groups than its own: to each group of the best partition, tasks of others are added
            for as long as this lowers the loss of its own tasks.
        num_subsets, subset_size, seed: see [`predicted_affinity`].

    Raises:
        `ConfigurationError`: for an unknown method or an impossible number of groups.
    """
    names = estimator.task_names
    if method not in GROUPING_METHODS:
        raise ConfigurationError(f"method has to be one of {GROUPING_METHODS}, found {method!r}.")
    if num_groups != "auto" and not (isinstance(num_groups, int) and 1 <= num_groups <= len(names)):
        raise ConfigurationError(f"num_groups has to be 'auto' or from 1 to {len(names)}, found {num_groups!r}.")
    affinity = predicted_affinity(estimator, num_subsets, subset_size, seed) if len(names) > 1 else np.zeros((1, 1))
    group_losses = GroupLosses(lambda mixtures: estimator.predict(mixtures).loss)
    most = min(max_groups or len(names), len(names))
    counts = [num_groups] if num_groups != "auto" else _counts(most, method)
    directions = estimator.task_gradients()
    if method == "direct":
        partitions = _searched(group_losses, affinity, directions, counts, group_cost, num_candidates, seed)
        cuts = [(labels, members(labels)) for labels in partitions]
    else:
        cuts = _cuts(method, affinity, counts, num_groups == "auto", most, seed)
    losses = [group_losses.of_partition(labels, trained) / len(names) for labels, trained in cuts]
    sizes = [len(trained) for _, trained in cuts]
    best = int(np.argmin([loss + group_cost * size for loss, size in zip(losses, sizes)]))
    curve: dict[str, float] = {}
    for size, loss in zip(sizes, losses):
        curve[str(size)] = min(loss, curve.get(str(size), np.inf))
    labels, trained = cuts[best]
    if overlap:
        trained = with_helpers(group_losses, labels, trained, directions, num_candidates)
    helpers = trained & ~members(labels)
    why = f"{sizes[best]} groups have the least predicted loss, {losses[best]:.4f}, of {len(losses)} partitions"
    if num_groups != "auto":
        why = f"{num_groups} groups were asked for; the predicted loss of {sizes[best]} is {losses[best]:.4f}"
    elif group_cost:
        why = f"{sizes[best]} groups have the least predicted loss and cost of {len(losses)} partitions"
    if helpers.any():
        with_help = group_losses.of_partition(labels, trained) / len(names)
        why = f"{why}; with {helpers.sum()} helpers it is {with_help:.4f}"
    return Grouping(
        groups=_named(names, members(labels)),
        method=method,
        task_names=list(names),
        affinity=affinity.tolist(),
        predicted_loss=curve,
        why=f"{why}.",
        settings=settings_of(
            estimator,
            {
                "num_groups": num_groups,
                "max_groups": max_groups,
                "group_cost": group_cost,
                "num_candidates": num_candidates,
                "overlap": overlap,
                "num_subsets": num_subsets,
                "subset_size": subset_size,
                "seed": seed,
            },
        ),
        helpers={name: tasks for name, tasks in _named(names, helpers).items() if tasks},
        baselines=_baselines(group_losses, len(names), sizes[best], seed),
    )


def _cuts(
    method: str, affinity: np.ndarray, counts: Sequence[int], is_auto: bool, most: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Partitions of the affinity matrix, and what each group of them trains on."""
    if method == "coclustering":
        return [coclustering(affinity, count, seed) for count in counts]
    if method == "spectral":
        partitions = [spectral_partition(affinity, count, seed) for count in counts]
    else:
        partitions = [semidefinite_partition(affinity, count)[0] for count in counts]
        if is_auto:
            own, _ = semidefinite_partition(affinity)
            partitions += [own] if own.max() < most else []
    return [(labels, members(labels)) for labels in partitions]


def _counts(most: int, method: str) -> list[int]:
    """Numbers of groups to try."""
    if method == "direct" or most <= max(_MOST_COUNTS.values()):
        return list(range(1, most + 1))
    return sorted({int(round(count)) for count in np.geomspace(1, most, _MOST_COUNTS[method])})


def _baselines(losses: GroupLosses, num_tasks: int, num_groups: int, seed: int) -> dict[str, float]:
    """Mean losses of partitions that nothing speaks for, the random ones on average."""
    generator = np.random.default_rng(seed)
    # Dealt like cards: sizes differ by one at most.
    dealt = [generator.permutation(np.arange(num_tasks) % num_groups) for _ in range(_NUM_RANDOM)]
    return {
        "one group": losses.of_partition(np.zeros(num_tasks, dtype=int)) / num_tasks,
        "one per task": losses.of_partition(np.arange(num_tasks)) / num_tasks,
        "random": float(np.mean([losses.of_partition(labels) for labels in dealt])) / num_tasks,
    }


def _named(names: Sequence[str], masks: np.ndarray) -> dict[str, list[str]]:
    return {f"group_{row}": [name for name, held in zip(names, mask) if held] for row, mask in enumerate(masks)}


def _searched(
    losses: GroupLosses,
    affinity: np.ndarray,
    directions: np.ndarray,
    counts: Sequence[int],
    group_cost: float,
    num_candidates: int,
    seed: int,
) -> list[np.ndarray]:
    """For each number of groups a partition by merges; the best are improved, from there and from spectral clusters."""
    path = {
        labels.max() + 1: (labels, loss)
        for labels, loss in merge_path(losses, directions, num_candidates, fewest=min(counts))
    }
    price = group_cost * len(affinity)
    found = []
    for rank, count in enumerate(sorted(counts, key=lambda count: path[count][1] + price * count)):
        labels = path[count][0]
        if rank < _NUM_IMPROVED:
            starts = [labels, spectral_partition(affinity, count, seed)]
            labels = min(
                (improved(losses, start, directions, num_candidates) for start in starts), key=losses.of_partition
            )
        found.append(labels)
    return sorted(found, key=max)
