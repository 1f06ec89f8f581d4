"""Evaluation rows for tasks that have none: a share of their training rows."""

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import TaskError
from .columns import EXAMPLE_ID
from .rows import add_identity

if TYPE_CHECKING:
    from .task_set import Task

# Fewer rows tell too little about a task, and more are not needed for a choice.
_LEAST, _MOST = 20, 500


def num_held_out(num_rows: int, fraction: float) -> int:
    """Number of rows that are held out of `num_rows`: the share, but 20 to 500 and at most half of them.

    Raises:
        `TaskError`: for fewer than two rows.
    """
    if num_rows < 2:
        raise TaskError(f"Expected at least 2 rows to hold one of them out for evaluation, found {num_rows}.")
    return min(max(round(fraction * num_rows), _LEAST), _MOST, num_rows // 2)


def hold_out(task: "Task", fraction: float, seed: int) -> "Task":
    """Move a share of a task's training rows to its validation rows.

    Rows are drawn by a hash of seed and example id, so which ones are held out does not depend on their order.

    Args:
        task (`Task`): a task without validation rows.
        fraction (`float`): share of the rows, see [`num_held_out`].
        seed (`int`): seed of the draw.

    Raises:
        `TaskError`: for a task with a single row.
    """
    train = task.splits["train"]
    drawn = [hashlib.blake2b(f"{seed}\n{example}".encode(), digest_size=8).digest() for example in train[EXAMPLE_ID]]
    ranked = sorted(range(len(train)), key=drawn.__getitem__)
    try:
        out = set(ranked[: num_held_out(len(train), fraction)])
    except TaskError as error:
        raise TaskError(f"Task {task.name!r}: {error}") from None
    splits, fingerprints = dict(task.splits), dict(task.fingerprints)
    for split, is_out in (("train", False), ("validation", True)):
        rows = train.select([position for position in range(len(train)) if (position in out) is is_out])
        splits[split], fingerprints[split] = add_identity(task.name, split, rows, task.row_format)
    return replace(task, splits=splits, fingerprints=fingerprints)
