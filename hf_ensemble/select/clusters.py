"""Splits a task's training rows into clusters that are selected as tasks of their own."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from sklearn.cluster import KMeans

from .._settings import check_at_least, checked_mapping, checked_names
from ..errors import ConfigurationError
from ..estimate import ObservedRun
from ..store import FeatureTable
from .directions import unit_directions

# Task names do not contain it, so a cluster is never mistaken for another task.
_SEPARATOR = "/"


def cluster_name(task: str, index: int) -> str:
    return f"{task}{_SEPARATOR}{index}"


def task_of(name: str) -> str:
    """The task that a cluster belongs to; a whole task belongs to itself."""
    return name.partition(_SEPARATOR)[0]


def cluster_counts(names: Iterable[str]) -> dict[str, int]:
    """Number of clusters of each clustered task, from the names of all tasks and clusters."""
    return dict(Counter(task_of(name) for name in names if _SEPARATOR in name))


def split_into_clusters(
    train: FeatureTable, validation: FeatureTable, clusters: Mapping[str, int]
) -> tuple[FeatureTable, FeatureTable]:
    """Split the training rows of some tasks by k-means over the directions of their features.

    The clusters `TASK/0`, `TASK/1`, ..., largest first, take the task's place. Each cluster gets all of the task's
    validation rows. The features of one task at a time are in memory.

    Args:
        train, validation (`FeatureTable`): features of the same tasks.
        clusters (`dict[str, int]`): number of clusters by task.

    Raises:
        `ConfigurationError`: for unknown tasks, more clusters than rows, and tasks of which not all rows are captured.
    """
    for name, count in checked_mapping("clusters", clusters).items():
        check_at_least(f"The number of clusters of {name!r}", count, 1)
    checked_names("tasks to cluster", clusters, train.task_names)
    for name, captured, size in zip(train.task_names, train.num_captured.tolist(), train.sizes.tolist()):
        if name in clusters and captured < size:
            raise ConfigurationError(
                f"Gradients of {captured} of the {size} training rows of {name!r} are captured, and the other rows "
                "belong to no cluster.",
                python=f"Capture all of them: capture_rows=None, or a dict by task without {name!r}.",
                terminal=f"Capture all of them: --capture_rows null, or JSON by task without {name!r}.",
            )
    names: list[str] = []
    sizes: list[int] = []
    task = np.empty(len(train), dtype=int)
    rows, tasks = [], []
    for index, name in enumerate(train.task_names):
        own, held_out = np.flatnonzero(train.task == index), np.flatnonzero(validation.task == index)
        count = clusters.get(name)
        if count is None:
            labels, count = np.zeros(len(own), dtype=int), 1
            own_names = [name]
            sizes.append(int(train.sizes[index]))
        else:
            if count > len(own):
                raise ConfigurationError(
                    f"Task {name!r} has {len(own)} training rows: expected 1 to {len(own)} clusters, found {count}."
                )
            labels = _clusters(train.features[own], count)
            count = int(labels.max()) + 1
            own_names = [cluster_name(name, label) for label in range(count)]
            sizes += np.bincount(labels).tolist()
        task[own] = len(names) + labels
        for label in range(count):
            rows.append(held_out)
            tasks.append(np.full(len(held_out), len(names) + label))
        names += own_names
    kept = np.concatenate(rows)
    held_out_sizes = None
    if validation.task_sizes is not None:
        held_out_sizes = np.array([validation.sizes[validation.task_names.index(task_of(name))] for name in names])
    return (
        replace(
            train,
            task=task,
            task_names=tuple(names),
            task_sizes=None if train.task_sizes is None else np.array(sizes),
        ),
        replace(
            validation.of_rows(kept),
            task=np.concatenate(tasks),
            task_names=tuple(names),
            task_sizes=held_out_sizes,
        ),
    )


def runs_by_cluster(runs: Sequence[ObservedRun], names: Sequence[str]) -> list[ObservedRun]:
    """Observed runs on whole tasks, with each task's values repeated for its clusters."""
    return [
        ObservedRun(**{argument: values_by_cluster(values, names) for argument, values in run.as_dict().items()})
        for run in runs
    ]


def values_by_cluster(by_task: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Values by task, repeated for each of the task's clusters in `names`; other names keep theirs."""
    known = {task_of(name) for name in names}
    found = {name: by_task[task_of(name)] for name in names if task_of(name) in by_task}
    return found | {name: value for name, value in by_task.items() if name not in known and name not in found}


def values_by_task(by_cluster: Mapping[str, float]) -> dict[str, float]:
    """The inverse of [`values_by_cluster`]."""
    return {task_of(name): value for name, value in by_cluster.items()}


def _clusters(features: np.ndarray, count: int) -> np.ndarray:
    """Labels by k-means over directions, largest cluster first; of fewer clusters where fewer directions differ."""
    directions, num_distinct = unit_directions(features)
    labels = KMeans(min(count, num_distinct), n_init=10, random_state=0).fit_predict(directions)
    order = [label for label, _ in sorted(Counter(labels.tolist()).items(), key=lambda item: (-item[1], item[0]))]
    return np.array([order.index(label) for label in labels.tolist()])
