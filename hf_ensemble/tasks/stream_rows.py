"""Rows of streaming datasets: the first ones as a table, and all of them with their task, checked as they come."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset

from .._values import plain_values
from ..errors import TaskError
from .columns import EXAMPLE_ID, TASK, column_names, renamed_class
from .row_checks import IMAGE_COLUMNS, check_row
from .rows import RowFormat, content_hash
from .sft_rows import SFTRows
from .task import Task, as_dataset, table_of


def first_rows(task: str, stream: IterableDataset, num_rows: int) -> Dataset:
    """The first rows of a stream as a table; all of them where it has fewer.

    Args:
        task (`str`): the task's name, for errors.
        stream (`IterableDataset`): the stream.
        num_rows (`int`): how many rows to read.

    Raises:
        `TaskError`: for a stream without rows, and rows that do not form one table.
    """
    rows = list(stream.with_format(None).take(num_rows))
    if not rows:
        raise TaskError(f"Task {task!r} is empty: its stream has no rows.")
    if stream.features is None:
        return as_dataset(task, rows)
    return table_of(rows, f"Task {task!r}", stream.features)


def identified_stream(task: Task, stream: IterableDataset, sft: SFTRows = SFTRows()) -> IterableDataset:
    """A stream's rows with `task` and `example_id`, checked and with labels as numbers, like the rows of the task.

    Args:
        task (`Task`): the task, made of the stream's first rows.
        stream (`IterableDataset`): its training rows.
        sft (`SFTRows`, *optional*): how an `SFTTrainer` reads rows of the format `sft`.
    """
    columns = column_names(stream)
    dropped = [column for column in columns if column not in (*task.row_format.used(columns), TASK, EXAMPLE_ID)]
    has_class = task.row_format in (RowFormat.CLASSIFICATION, RowFormat.TOKENIZED)
    identify = partial(
        _identified,
        name=task.name,
        row_format=task.row_format,
        label_names=task.label_names,
        renamed=renamed_class(columns) if has_class else {},
        sft=sft,
    )
    return stream.with_format(None).map(identify, with_indices=True, remove_columns=dropped)


def _identified(
    row: Mapping[str, Any],
    index: int,
    name: str,
    row_format: RowFormat,
    label_names: tuple[str, ...] | None,
    renamed: Mapping[str, str],
    sft: SFTRows,
) -> dict[str, Any]:
    row = {renamed.get(column, column): value for column, value in row.items()}
    own = {column: row[column] for column in row_format.used(row) if column not in (TASK, EXAMPLE_ID)}
    # What a generator yields are tuples and arrays, where a table has lists.
    own = plain_values(own, lambda value: value)
    if row_format is RowFormat.SFT:
        sft.check_row(name, "train", index, own)
    else:
        check_row(name, "train", index, own, row_format)
    if label_names is not None:
        own["label"] = _label(own["label"], index, name, label_names)
    hashed = {column: value for column, value in own.items() if column not in IMAGE_COLUMNS}
    return {**own, TASK: name, EXAMPLE_ID: str(row.get(EXAMPLE_ID) or content_hash(hashed))}


def _label(label: Any, index: int, name: str, label_names: Iterable[str]) -> int:
    known = list(label_names)
    number = known.index(label) if label in known else label
    if not isinstance(number, int) or not 0 <= number < len(known):
        raise TaskError(
            f"Task {name!r}, split 'train', row {index} (counted from 0): label {label!r} is outside the task's set of "
            f"{len(known)} labels {known!s:.200}, which the first rows of the stream define. Cast the column to "
            "datasets.ClassLabel, or raise streaming_rows."
        )
    return int(number)
