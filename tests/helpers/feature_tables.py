"""Generated gradient features: tasks that help and harm each other."""

from dataclasses import replace

import numpy as np

from hf_ensemble.estimate import ObservedRun
from hf_ensemble.store import FeatureTable

NAMES = ("a", "b", "c", "d")


def world(rows=40, dim=60, seed=0, tokens=False):
    """Tasks a and b want the same move, c the opposite, d something else; answers of one token, or of several."""
    rng = np.random.default_rng(seed)
    helpful, other = rng.normal(size=(2, dim)) / np.sqrt(dim)
    direction = np.stack([helpful, helpful, -helpful, other])

    def table(count):
        task = np.repeat(np.arange(4), count)
        features = rng.normal(size=(4 * count, dim)) / np.sqrt(dim) + 0.5 * direction[task]
        margin = rng.normal(size=4 * count)
        ids = np.array([str(i) for i in range(4 * count)])
        num_tokens = np.array([1, 9, 3, 20])[task] + rng.integers(0, 5, 4 * count) if tokens else None
        return FeatureTable(features.astype(np.float32), margin.astype(np.float32), task, NAMES, ids, num_tokens)

    return table(rows), table(rows)


def sample_of(table, rows):
    """The table of these rows alone, a sample of all of them."""
    arrays = {name: getattr(table, name) for name in ("features", "margin", "task", "example_id", "num_tokens")}
    own = {name: None if values is None else values[rows] for name, values in arrays.items()}
    return replace(table, **own, task_sizes=table.num_captured)


def first_rows(table, counts):
    """A sample of the first rows of each task, as many as `counts` says."""
    return sample_of(table, np.concatenate([np.flatnonzero(table.task == k)[:n] for k, n in enumerate(counts)]))


SIX_NAMES = ("a", "b", "c", "d", "e", "f")
RUNS = [ObservedRun(dict.fromkeys(SIX_NAMES, 1.0), dict.fromkeys(SIX_NAMES, 0.7))]
HELPS = {"a": 1.0, "b": 1.0, "c": -1.0, "d": 0.0, "e": 0.6, "f": -0.4}


def six_tasks(rows=30, dim=40, seed=0):
    """Tasks that want the same move as a, more or less; tasks have rows and tokens of different numbers."""
    rng = np.random.default_rng(seed)
    move = rng.normal(size=dim) / np.sqrt(dim)

    def table(count):
        counts = [count + 5 * index for index in range(len(SIX_NAMES))]
        task = np.repeat(np.arange(len(SIX_NAMES)), counts)
        wish = np.array([HELPS[name] for name in SIX_NAMES])[task, None] * move
        features = rng.normal(size=(len(task), dim)) / np.sqrt(dim) + 0.7 * wish
        ids = np.array([str(index) for index in range(len(task))])
        return FeatureTable(
            features.astype(np.float32), rng.normal(size=len(task)).astype(np.float32), task, SIX_NAMES, ids, task + 1
        )

    return table(rows), table(rows)
