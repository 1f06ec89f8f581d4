"""Which rows of a task are captured where it has more than are asked for: a seeded sample, stratified by label."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Value

from .._settings import check_at_least, checked_mapping, checked_names
from ..errors import ConfigurationError
from ..tasks import EXAMPLE_ID, TASK
from ..tasks.sampling import systematic_positions

# Rows of a task: a number for each task, one by task, or all of them.
RowLimit = int | Mapping[str, int | None] | None
# A single row says nothing of how far the others are from it.
_LEAST = 2


def checked_limit(name: str, value: Any) -> RowLimit:
    """A limit, which may be given as text, as on a command line.

    Raises:
        `ConfigurationError`: for anything but an integer of at least two, a dict of them by task, or `None`.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConfigurationError(
                f"Expected {name} as an integer, or as JSON by task, found {value!r:.80} ({error})."
            ) from error
    if not isinstance(value, Mapping):
        check_at_least(name, value, _LEAST, optional=True)
        return None if value is None else int(value)
    for task, limit in checked_mapping(name, value).items():
        check_at_least(f"{name} of {task!r}", limit, _LEAST, optional=True)
    return {task: None if limit is None else int(limit) for task, limit in value.items()}


def check_limited_tasks(name: str, limit: RowLimit, tasks: Sequence[str]) -> None:
    """Raise `ConfigurationError` for a limit of unknown tasks."""
    if isinstance(limit, Mapping):
        checked_names(f"tasks in {name}", limit, tasks)


def num_captured(limit: RowLimit, task: str, num_rows: int) -> int:
    """How many of a task's rows are captured; tasks that a dict leaves out have no limit."""
    own = limit.get(task) if isinstance(limit, Mapping) else limit
    return num_rows if own is None else min(own, num_rows)


@dataclass(frozen=True)
class RowSample:
    """The rows of a split that are captured.

    Args:
        rows (`Dataset`): these rows, in the order of all rows; all rows themselves where none is left out.
        num_rows (`dict[str, int]`): number of all rows of the tasks of which not all are captured.
        num_captured (`dict[str, int]`): number of captured rows of these tasks.
    """

    rows: Dataset
    num_rows: Mapping[str, int]
    num_captured: Mapping[str, int]


def sample_rows(rows: Dataset, limit: RowLimit, seed: int = 0) -> RowSample:
    """Sample the rows of each task that has more than its limit, see [`sampled_positions`].

    Args:
        rows (`Dataset`): rows with `task` and `example_id`, and with `labels` where they may be classes.
        limit (`int` or `dict[str, int]`, *optional*): number of rows of each task, or by task; `None` for all.
        seed (`int`, *optional*, defaults to 0): seed of the sample.
    """
    plain = rows.with_format(None)
    owner = np.array(plain[TASK][:])
    tasks, totals = np.unique(owner, return_counts=True)
    sizes = {
        task: (total, count)
        for task, total in zip(tasks.tolist(), totals.tolist())
        if (count := num_captured(limit, task, total)) < total
    }
    if not sizes:
        return RowSample(rows, {}, {})
    ids = plain[EXAMPLE_ID][:]
    label = plain.features.get("labels")
    has_classes = isinstance(label, Value) and "int" in label.dtype
    labels = np.array(plain["labels"][:]) if has_classes else np.zeros(len(ids), dtype=int)
    kept = np.ones(len(ids), dtype=bool)
    for task, (_, count) in sizes.items():
        own = np.flatnonzero(owner == task)
        kept[own] = False
        kept[own[sampled_positions([ids[i] for i in own], labels[own], count, f"{seed}\n{task}")]] = True
    return RowSample(
        rows.select(np.flatnonzero(kept)),
        {task: total for task, (total, _) in sizes.items()},
        {task: count for task, (_, count) in sizes.items()},
    )


def sampled_positions(ids: Sequence[str], labels: np.ndarray, size: int, key: str) -> np.ndarray:
    """`size` of the rows, ascending; each row is among them with the same probability.

    A systematic sample of the rows, sorted by label and within a label by a hash of key and id: as many rows of a label
    as its share of all rows, rounded up or down. It does not depend on the rows' order.

    Args:
        ids (`Sequence[str]`): id of each row.
        labels (`np.ndarray` of shape `(n,)`): label of each row.
        size (`int`): number of rows to draw, at most `n`.
        key (`str`): what the draw depends on beside the ids.
    """
    hashes = [_hash(f"{key}\n{example}") for example in ids]
    order = np.array(sorted(range(len(ids)), key=lambda row: (labels[row], hashes[row])), dtype=int)
    start = int.from_bytes(_hash(key), "big") / 2**64
    return np.sort(order[systematic_positions(len(ids), size, start)])


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
