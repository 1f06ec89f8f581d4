"""The columns for every row's task and example id, and how they get into the batch.

`Trainer` drops columns that are not arguments of the model's forward, and models with `**kwargs` silently accept any
argument. Therefore the columns are kept explicitly, collated separately, and popped before the model gets the batch.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset

TASK = "task"
EXAMPLE_ID = "example_id"
META_COLUMNS = (TASK, EXAMPLE_ID)
# Tokens of each row, in batches that hold the tokens of all rows one after another.
ROW_LENGTHS = "row_lengths"


def column_names(rows: Dataset | IterableDataset) -> list[str]:
    """Columns of a table or stream; those of the first row where a stream does not know them."""
    return list(next(iter(rows))) if rows.column_names is None else list(rows.column_names)


def renamed_class(columns: Iterable[str]) -> dict[str, str]:
    """How the column of a row's class has to be renamed, if at all: datasets have it as `label` and as `labels`."""
    found = set(columns)
    if "input_ids" in found:
        return {"label": "labels"} if "label" in found and "labels" not in found else {}
    is_text = "text" in found and "messages" not in found and not {"prompt", "completion"} <= found
    return {"labels": "label"} if is_text and "labels" in found and "label" not in found else {}


@dataclass
class TaskCollator:
    """Wraps a data collator, and returns the meta columns as lists of `str` next to its output.

    A collator without padding (`padding_free`) loses which tokens are whose, so that the batch also gets each row's
    number of tokens.

    Args:
        collator (`Callable`): collator of all other columns.
    """

    collator: Callable[[list[Mapping[str, Any]]], Mapping[str, Any]]

    def __call__(self, examples: list[Mapping[str, Any]]) -> dict[str, Any]:
        meta = {column: [example[column] for example in examples] for column in META_COLUMNS if column in examples[0]}
        if meta and getattr(self.collator, "padding_free", False):
            meta[ROW_LENGTHS] = [len(example["input_ids"]) for example in examples]
        rest = [{key: value for key, value in example.items() if key not in META_COLUMNS} for example in examples]
        return {**self.collator(rest), **meta}


def pop_meta(batch: dict[str, Any]) -> dict[str, list]:
    """Remove what [`TaskCollator`] has added to `batch`, in place.

    Returns:
        `dict[str, list]`: the removed columns, with one entry per row.
    """
    return {column: batch.pop(column) for column in (*META_COLUMNS, ROW_LENGTHS) if column in batch}
