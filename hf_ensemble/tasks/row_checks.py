"""What a row's values have to be, by its format."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from datasets import Dataset

from ..errors import TaskError
from .answers import IGNORE_INDEX
from .rows import RowFormat

# Columns that trl reads for models of text and images.
IMAGE_COLUMNS = ("image", "images")


def check_rows(task: str, split: str, rows: Dataset, row_format: RowFormat) -> None:
    """Check the values of one split of a task, before anything is made of them.

    Labels of classification tasks are [`label_names_of`]'s. Rows of the format `sft` are [`SFTRows`]'s, since the
    trainer's arguments say what it reads of them.

    Raises:
        `TaskError`: for the first row with a missing value or one of another kind; for columns of images.
    """
    if row_format is RowFormat.SFT:
        return
    refuse_images(task, split, rows)
    columns = [column for column in row_format.used(rows.column_names) if column != "label"]
    for number, row in numbered_rows(rows, columns):
        check_row(task, split, number, row, row_format)


def check_row(task: str, split: str, number: int, row: Mapping[str, Any], row_format: RowFormat) -> None:
    """Raise `TaskError` for a row with a missing value or one of another kind."""
    fault = _FAULTS[row_format](row)
    if fault is not None:
        raise row_error(task, split, number, fault)


def numbered_rows(rows: Dataset, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """These columns of each row, in batches, and the row's number."""
    number = 0
    for batch in rows.with_format(None).select_columns(list(columns)).iter(batch_size=1000):
        for values in zip(*(batch[column] for column in columns)):
            yield number, dict(zip(columns, values))
            number += 1


def row_error(task: str, split: str, number: int, fault: str) -> TaskError:
    """The error for a row with a fault."""
    return TaskError(
        f"Task {task!r}, split {split!r}, row {number} (counted from 0): {fault}. Correct the row or drop it."
    )


def image_columns(columns: Iterable[str]) -> list[str]:
    """The columns of images that trl would read; none where rows are tokens already."""
    found = set(columns)
    return [] if "input_ids" in found else [column for column in IMAGE_COLUMNS if column in found]


def refuse_images(task: str, split: str, rows: Dataset) -> None:
    """Raise `TaskError` for rows with images, which neither captures nor ensembles take."""
    images = image_columns(rows.column_names)
    if images:
        raise TaskError(
            f"Task {task!r}, split {split!r}: rows with images are not supported here, found the columns {images}. "
            "Remove them with Dataset.remove_columns to train on the text alone, or train one model on all datasets "
            "with an SFT trainer, without an adapter."
        )


def _text_fault(row: Mapping[str, Any]) -> str | None:
    return fault_of_strings(row, ("text",))


def prompt_fault(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a prompt and its completion."""
    columns = ("prompt", "completion")
    if not any(isinstance(row[column], list) for column in columns):
        return fault_of_strings(row, columns, "a string or a list of messages") or fault_of_extras(row)
    return next(filter(None, (fault_of_messages(row[column], column) for column in columns)), fault_of_extras(row))


def _chat_fault(row: Mapping[str, Any]) -> str | None:
    fault = fault_of_messages(row["messages"], "messages") or fault_of_extras(row)
    if fault is None and all(message["role"] != "assistant" for message in row["messages"]):
        return f"expected a message of the role 'assistant', found the roles {[m['role'] for m in row['messages']]}"
    return fault


def token_fault(row: Mapping[str, Any]) -> str | None:
    """What is wrong with tokens and their labels."""
    ids, labels = row["input_ids"], row["labels"]
    if not _are_integers(ids) or not len(ids) or min(ids) < 0:
        return f"expected token ids in 'input_ids', found {ids!r:.60}"
    for column in ("attention_mask", "token_type_ids", "completion_mask", "assistant_masks"):
        if row.get(column) is not None and len(row[column]) != len(ids):
            return f"expected {len(ids)} values in {column!r}, one for each token, found {len(row[column])}"
    if isinstance(labels, list) and labels and all(isinstance(label, float) and label in (0, 1) for label in labels):
        return None  # Several labels of a classifier.
    is_class = isinstance(labels, int | np.integer)
    if not is_class and not _are_integers(labels):
        return f"expected token ids or one class in 'labels', found {labels!r:.60}"
    own = [labels] if is_class else [label for label in labels if label != IGNORE_INDEX]
    if not own:
        return "expected an answer in 'labels', found -100 only"
    if min(own) < 0:
        return f"expected labels from 0, or {IGNORE_INDEX} where none counts, found {min(own)}"
    return None


_FAULTS = {
    RowFormat.TEXT: _text_fault,
    RowFormat.CLASSIFICATION: _text_fault,
    RowFormat.PROMPT_COMPLETION: prompt_fault,
    RowFormat.CHAT: _chat_fault,
    RowFormat.TOKENIZED: token_fault,
}


def fault_of_strings(row: Mapping[str, Any], columns: Iterable[str], expected: str = "a string") -> str | None:
    """What is wrong with columns that hold texts."""
    for column in columns:
        if not isinstance(row[column], str):
            return f"expected {expected} in {column!r}, found {row[column]!r:.60}"
    return None


def fault_of_messages(messages: Any, column: str, keys: tuple[str, str] = ("role", "content")) -> str | None:
    """What is wrong with a chat, whose messages say under these keys who speaks, and what."""
    role, content = keys
    if not isinstance(messages, list) or not messages:
        return f"expected a list of messages in {column!r}, found {messages!r:.60}"
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get(role), str):
            return f"expected messages with a {role} and a {content} in {column!r}, found {message!r:.60}"
        # Calls of tools, thoughts and whatever else a template reads.
        others = [value for key, value in message.items() if key not in (role, content, "name")]
        if not isinstance(message.get(content), str | list) and not (message.get(content) is None and any(others)):
            return f"expected a {content} in each message of {column!r}, found {message.get(content)!r:.60}"
    return None


def fault_of_extras(row: Mapping[str, Any]) -> str | None:
    """What is wrong with the columns that chat templates read besides the messages."""
    tools, arguments = row.get("tools"), row.get("chat_template_kwargs")
    with suppress(ValueError):
        tools = json.loads(tools) if isinstance(tools, str) else tools
    if tools is not None and not isinstance(tools, list):
        return f"expected a list of tools, or its JSON text, in 'tools', found {tools!r:.60}"
    if arguments is not None and not isinstance(arguments, Mapping):
        return f"expected a dict in 'chat_template_kwargs', found {arguments!r:.60}"
    return None


def _are_integers(values: Any) -> bool:
    if not isinstance(values, list | tuple):
        return False
    return all(isinstance(value, int | np.integer) and not isinstance(value, bool) for value in values)
