"""Row formats of tasks, and the ids of rows."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any

from datasets import ClassLabel, Dataset, Value

from .._values import plain_values
from ..errors import TaskError
from ..logging import get_logger
from .columns import EXAMPLE_ID, META_COLUMNS, TASK

logger = get_logger(__name__)

# More classes than any label set has: a larger number is a mistake, and a head is as large as its largest label.
_MAX_LABELS = 2**16


class RowFormat(StrEnum):
    """Format of a task's rows, by the columns they have."""

    TOKENIZED = "tokenized"
    CLASSIFICATION = "classification"
    PROMPT_COMPLETION = "prompt_completion"
    CHAT = "chat"
    TEXT = "text"
    # Whatever `trl.SFTTrainer` takes, which tokenizes the rows.
    SFT = "sft"

    @property
    def required(self) -> tuple[str, ...]:
        return _REQUIRED[self]

    def used(self, columns: Iterable[str]) -> list[str]:
        """Those of the columns that the format uses."""
        return [column for column in columns if self is RowFormat.SFT or column in _REQUIRED[self] + _OPTIONAL[self]]


_REQUIRED = {
    RowFormat.TOKENIZED: ("input_ids", "labels"),
    RowFormat.CLASSIFICATION: ("text", "label"),
    RowFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    RowFormat.CHAT: ("messages",),
    RowFormat.TEXT: ("text",),
    RowFormat.SFT: (),
}
_OPTIONAL = {
    RowFormat.TOKENIZED: ("attention_mask", "token_type_ids", "completion_mask", "assistant_masks", "seq_lengths"),
    RowFormat.CLASSIFICATION: ("label_text",),
    # Chat templates read these.
    RowFormat.PROMPT_COMPLETION: ("tools", "chat_template_kwargs"),
    RowFormat.CHAT: ("tools", "chat_template_kwargs"),
    RowFormat.TEXT: (),
    RowFormat.SFT: (),
}


def detect_format(task: str, columns: Iterable[str]) -> RowFormat:
    """Detect the format of a task from its columns.

    Raises:
        `TaskError`: for columns that match no format.
    """
    columns = set(columns)
    formats = [row_format for row_format in RowFormat if row_format.required]
    for row_format in formats:
        if columns.issuperset(row_format.required):
            return row_format
    known = " or ".join(" + ".join(row_format.required) for row_format in formats)
    raise TaskError(
        f"Task {task!r}: expected the columns {known}; found {sorted(columns)}. Rename the columns with "
        "Dataset.rename_columns."
    )


def content_hash(row: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that depend only on a row's values, be they in lists, arrays or tensors.

    Raises:
        `TaskError`: for objects that are no values, such as images.
    """
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=lambda value: plain_values(value, _exact_text))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def token_fingerprint(tables: Mapping[str, Dataset]) -> str:
    """32 hexadecimal digits that depend on every value of encoded rows: on the tokenizer and the truncation too."""
    digest = hashlib.blake2b(digest_size=16)
    for name, table in tables.items():
        digest.update(f"{name}: {len(table)}\n".encode())
        for row in table.with_format(None):
            digest.update(content_hash({key: value for key, value in row.items() if value is not None}).encode())
    return digest.hexdigest()


def _exact_text(value: Any) -> str:
    if isinstance(value, (date, time, timedelta, Decimal, bytes)):
        return str(value)
    raise TaskError(
        f"Expected rows of texts, numbers, dates, lists and dicts, found a {type(value).__name__}. Convert it, or drop "
        "the column."
    )


def add_identity(task: str, split: str, dataset: Dataset, row_format: RowFormat) -> tuple[Dataset, str]:
    """Add `task` and `example_id` to each row, and drop the columns that the format does not use.

    An existing `example_id` column is kept. Otherwise the id is a hash of the row's content, with a counter for
    repeated rows, so it survives shuffling, filtering and sorting.

    Returns:
        `tuple[Dataset, str]`: the dataset, and a fingerprint of its rows and their order.

    Raises:
        `TaskError`: for repeated ids, and for a `task` column with other values.
    """
    if TASK in dataset.column_names and set(dataset.unique(TASK)) != {task}:
        raise TaskError(
            f"Task {task!r}, split {split!r}: the column {TASK!r} is reserved for the task name, found "
            f"{sorted(map(str, dataset.unique(TASK)))[:5]}. Rename that column, or split the dataset by it."
        )
    used = row_format.used(column for column in dataset.column_names if column not in META_COLUMNS)
    unused = [column for column in dataset.column_names if column not in (*used, *META_COLUMNS)]
    if unused:
        logger.info("Task %r, split %r: columns %s are not used.", task, split, unused)
    content = dataset.select_columns(used)
    hashes = [content_hash(row) for row in content]
    if EXAMPLE_ID in dataset.column_names:
        ids = [str(i) for i in dataset[EXAMPLE_ID]]
        repeated = [i for i, count in Counter(ids).items() if count > 1]
        if repeated:
            raise TaskError(
                f"Task {task!r}, split {split!r}: {len(repeated)} values of {EXAMPLE_ID!r} repeat, for example "
                f"{repeated[0]!r}. Ids have to be unique within a split; drop the column to generate them."
            )
    else:
        seen: Counter = Counter()
        ids = []
        for value in hashes:
            ids.append(value if not seen[value] else f"{value}-{seen[value]}")
            seen[value] += 1
    # As JSON, since ids of the user's own may hold any character.
    fingerprint = hashlib.blake2b(json.dumps([ids, hashes]).encode(), digest_size=16).hexdigest()
    return content.add_column(TASK, [task] * len(ids)).add_column(EXAMPLE_ID, ids), fingerprint


def label_names_of(task: str, splits: Mapping[str, Dataset]) -> tuple[str, ...]:
    """Names of a classification task's labels, in the order of the labels.

    Names come from the `ClassLabel` feature or from `label_text`, and are `TASK:0`, `TASK:1`, ... otherwise.

    Raises:
        `TaskError`: for labels that are not integers from 0, and labels that the training split does not have.
    """
    for split, dataset in splits.items():
        _check_label_type(task, split, dataset)
    feature = splits["train"].features["label"]
    if isinstance(feature, ClassLabel):
        names = tuple(feature.names)
    else:
        found = splits["train"].unique("label")
        if min(found) < 0 or max(found) >= _MAX_LABELS:
            raise TaskError(
                f"Task {task!r}: labels have to be integers from 0 to the number of classes less 1, at most "
                f"{_MAX_LABELS - 1}, found {min(found) if min(found) < 0 else max(found)}. Drop these rows, or cast "
                "the column to datasets.ClassLabel."
            )
        names = _names_from_text(task, splits["train"], 1 + max(found))
        if len(names) > 2 * len(found):
            logger.warning(
                "Task %r: the largest label is %d, and only %d labels have training rows. If the others do not exist, "
                "cast the column to datasets.ClassLabel.",
                task,
                max(found),
                len(found),
            )
    for split, dataset in splits.items():
        own = dataset.features["label"]
        if isinstance(feature, ClassLabel) and isinstance(own, ClassLabel) and own.names != feature.names:
            raise TaskError(
                f"Task {task!r}, split {split!r}: expected the labels of the training rows in their order, "
                f"{feature.names}, found {own.names}. Cast the column to the training rows' ClassLabel."
            )
        outside = [label for label in dataset.unique("label") if not 0 <= label < len(names)]
        if outside:
            raise TaskError(
                f"Task {task!r}, split {split!r}: label {min(outside)} is outside the task's set of {len(names)} "
                f"labels {list(names)!s:.200}, which the training split defines. Drop these rows."
            )
    return names


def _check_label_type(task: str, split: str, dataset: Dataset) -> None:
    feature = dataset.features["label"]
    plain = dataset.with_format(None)
    is_integer = isinstance(feature, Value) and (feature.dtype == "bool" or "int" in feature.dtype)
    if not isinstance(feature, ClassLabel) and not is_integer:
        raise TaskError(
            f"Task {task!r}, split {split!r}: labels have to be integers from 0, one for each row, found "
            f"{plain[0]['label']!r:.60}. Cast the column to datasets.ClassLabel."
        )
    labels = plain["label"][:]
    if None in labels:
        raise TaskError(
            f"Task {task!r}, split {split!r}, row {labels.index(None)} (counted from 0): expected a label, found none. "
            "Correct the row or drop it."
        )


def _names_from_text(task: str, train: Dataset, num_labels: int) -> tuple[str, ...]:
    names = {label: f"{task}:{label}" for label in range(num_labels)}
    if "label_text" in train.column_names:
        pairs = set(zip(train["label"], train["label_text"]))
        if len({label for label, _ in pairs}) == len(pairs) == len({text for _, text in pairs}):
            names.update(pairs)
        else:
            logger.warning("Task %r: label_text is not unique for each label, so the labels are named by number.", task)
    return tuple(names[label] for label in range(num_labels))
