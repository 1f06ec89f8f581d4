"""The two columns that tell every row's task and identity, and how they travel to the batch.

`Trainer` drops every column that is not an argument of the model's forward, and models with `**kwargs` swallow unknown
arguments in silence. So the columns are kept on purpose, collated apart, and popped before the model sees the batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

TASK = "task"
EXAMPLE_ID = "example_id"
META_COLUMNS = (TASK, EXAMPLE_ID)


@dataclass
class TaskCollator:
    """Wraps a data collator: the meta columns pass beside it and come back as lists of `str`.

    Args:
        collator (`Callable`):
            The collator of everything else.
    """

    collator: Callable[[list[Mapping[str, Any]]], Mapping[str, Any]]

    def __call__(self, examples: list[Mapping[str, Any]]) -> dict[str, Any]:
        meta = {column: [example[column] for example in examples] for column in META_COLUMNS if column in examples[0]}
        rest = [{key: value for key, value in example.items() if key not in META_COLUMNS} for example in examples]
        return {**self.collator(rest), **meta}


def pop_meta(batch: dict[str, Any]) -> dict[str, list[str]]:
    """Take the meta columns out of `batch`, in place.

    Returns:
        `dict[str, list[str]]`: the columns that were there, each with one entry per row.
    """
    return {column: batch.pop(column) for column in META_COLUMNS if column in batch}
