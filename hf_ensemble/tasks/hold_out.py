"""Evaluation rows for a dataset that has none: a share of its training rows."""

import hashlib

from datasets import Dataset

from ..errors import TaskError
from .columns import EXAMPLE_ID

# Fewer rows tell too little about a task, and more are not needed for a choice.
_LEAST, _MOST = 20, 500


def num_held_out(num_rows: int, fraction: float) -> int:
    """How many of a task's rows are held out: `fraction` of them, at least 20, at most 500, never more than half."""
    return min(max(round(fraction * num_rows), _LEAST), _MOST, num_rows // 2)


def hold_out(
    task: str, rows: Dataset, fraction: float, seed: int, max_rows: int | None = None
) -> tuple[Dataset, Dataset]:
    """Split a task's rows into those to train on and those held out, both in their order.

    How many are held out says [`num_held_out`]. They are drawn by a hash of seed and example id, so which ones they are
    does not depend on the rows' order.

    Args:
        task (`str`): name of the task.
        rows (`Dataset`): its rows, with `example_id`.
        fraction (`float`): share of the rows.
        seed (`int`): seed of the draw.
        max_rows (`int`, *optional*): maximum number of rows to hold out.

    Raises:
        `TaskError`: for a task with a single row.
    """
    if len(rows) < 2:
        raise TaskError(f"Task {task!r}: expected at least 2 rows to hold one out for evaluation, found {len(rows)}.")
    count = num_held_out(len(rows), fraction)
    return draw_out(rows, count if max_rows is None else min(count, max_rows), seed)


def draw_out(rows: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """The other rows and `count` of them, see [`hold_out`]."""
    drawn = [hashlib.blake2b(f"{seed}\n{example}".encode(), digest_size=8).digest() for example in rows[EXAMPLE_ID]]
    ranked = sorted(range(len(rows)), key=drawn.__getitem__)
    out = set(ranked[:count])
    kept = [position for position in range(len(rows)) if position not in out]
    return rows.select(kept), rows.select(sorted(out))
