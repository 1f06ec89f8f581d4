"""Parts of a dataset as tasks of their own, so that every choice can be made among them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from sklearn.cluster import KMeans

from ..errors import ConfigurationError
from ..estimate import ObservedRun
from ..store import FeatureTable

# No task's name has one, so that a part's name is never that of another task.
_SEPARATOR = "/"


def part_name(task: str, index: int) -> str:
    return f"{task}{_SEPARATOR}{index}"


def task_of(name: str) -> str:
    """The task that a part belongs to; of a whole task, itself."""
    return name.partition(_SEPARATOR)[0]


def cluster_counts(names: Iterable[str]) -> dict[str, int]:
    """How many parts each divided task has, by the names of all parts and tasks."""
    return dict(Counter(task_of(name) for name in names if _SEPARATOR in name))


def divided(
    train: FeatureTable, validation: FeatureTable, clusters: Mapping[str, int]
) -> tuple[FeatureTable, FeatureTable]:
    """The same rows with some tasks' training rows divided by k-means over their features' directions.

    Each part is a task of its own, `TASK/0`, `TASK/1`, ..., in the place of the whole, the largest first. A part's
    validation rows are those of the whole task.

    Args:
        train, validation (`FeatureTable`): features of the same tasks.
        clusters (`dict[str, int]`): into how many parts to divide a task.

    Raises:
        `ConfigurationError`: for unknown tasks, and more parts than rows.
    """
    unknown = sorted(set(clusters) - set(train.task_names))
    if unknown:
        raise ConfigurationError(f"Unknown tasks {unknown}; the tasks are {list(train.task_names)}.")
    names: list[str] = []
    task = np.empty(len(train), dtype=int)
    rows, tasks = [], []
    for index, name in enumerate(train.task_names):
        own, held_out = np.flatnonzero(train.task == index), np.flatnonzero(validation.task == index)
        count = clusters.get(name)
        if count is None:
            labels, count = np.zeros(len(own), dtype=int), 1
            parts = [name]
        else:
            if not 1 <= count <= len(own):
                raise ConfigurationError(
                    f"Task {name!r} has {len(own)} training rows: expected 1 to {len(own)} parts, found {count}."
                )
            labels = _clusters(train.features[own], count)
            count = int(labels.max()) + 1
            parts = [part_name(name, part) for part in range(count)]
        task[own] = len(names) + labels
        for part in range(count):
            rows.append(held_out)
            tasks.append(np.full(len(held_out), len(names) + part))
        names += parts
    kept = np.concatenate(rows)
    arrays = {key: getattr(validation, key)[kept] for key in ("features", "margin", "example_id")}
    tokens = None if validation.num_tokens is None else validation.num_tokens[kept]
    return (
        replace(train, task=task, task_names=tuple(names)),
        replace(validation, task=np.concatenate(tasks), task_names=tuple(names), num_tokens=tokens, **arrays),
    )


def divided_runs(runs: Sequence[ObservedRun], names: Sequence[str]) -> list[ObservedRun]:
    """Fine-tunings of whole tasks, in terms of their parts."""
    return [ObservedRun(divided_weights(run.mixture, names), divided_weights(run.losses, names)) for run in runs]


def divided_weights(by_task: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """A value of each whole task as that of each of its parts; values of names that are no task here stay."""
    known = {task_of(name) for name in names}
    found = {name: by_task[task_of(name)] for name in names if task_of(name) in by_task}
    return found | {name: value for name, value in by_task.items() if name not in known and name not in found}


def whole_weights(by_part: Mapping[str, float]) -> dict[str, float]:
    """The way back from [`divided_weights`]."""
    return {task_of(name): value for name, value in by_part.items()}


def _clusters(features: np.ndarray, count: int) -> np.ndarray:
    """Labels by k-means over directions, the largest cluster first; as many as are not empty."""
    directions = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    labels = KMeans(count, n_init=10, random_state=0).fit_predict(directions)
    order = [label for label, _ in sorted(Counter(labels.tolist()).items(), key=lambda item: (-item[1], item[0]))]
    return np.array([order.index(label) for label in labels.tolist()])
