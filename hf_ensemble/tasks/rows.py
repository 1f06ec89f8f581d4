"""Row formats of tasks, and the ids of rows."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any

from datasets import Dataset
from datasets.features.features import require_decoding

from .._values import plain_values
from ..errors import TaskError
from ..logging import get_logger
from .columns import EXAMPLE_ID, META_COLUMNS, TASK

logger = get_logger(__name__)


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
# Inputs of some models, which `Trainer` passes on.
FURTHER_INPUTS = ("position_ids", "global_attention_mask", "decoder_input_ids", "decoder_attention_mask", "bbox")
_OPTIONAL = {
    RowFormat.TOKENIZED: (
        *("attention_mask", "token_type_ids", "completion_mask", "assistant_masks", "seq_lengths"),
        *FURTHER_INPUTS,
    ),
    RowFormat.CLASSIFICATION: ("label_text",),
    # Chat templates read these.
    RowFormat.PROMPT_COMPLETION: ("tools", "chat_template_kwargs"),
    RowFormat.CHAT: ("tools", "chat_template_kwargs"),
    RowFormat.TEXT: (),
    RowFormat.SFT: (),
}


# What datasets often call these columns, the likeliest first.
_NEAR = {
    "prompt": ("question", "instruction", "query", "problem", "input"),
    "completion": ("answer", "output", "response", "solution", "target"),
    "text": ("sentence", "content", "review", "tweet"),
    "label": ("category", "class", "sentiment"),
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
    raise unknown_columns(task, columns, [row_format.required for row_format in formats])


def unknown_columns(
    task: str, columns: Iterable[str], known: Iterable[Iterable[str]], split: str | None = None
) -> TaskError:
    """The error for a task whose columns are none of those known; it says what to rename where that can be guessed."""
    found, formats = sorted(columns), [tuple(own) for own in known]
    expected = " or ".join(" + ".join(own) for own in formats)
    python, terminal = _remedies(task, found, formats)
    where = f"Task {task!r}" if split is None else f"Task {task!r}, split {split!r}"
    return TaskError(f"{where}: expected the columns {expected}; found {found}.", python=python, terminal=terminal)


def _remedies(task: str, columns: list[str], formats: list[tuple[str, ...]]) -> tuple[str, str]:
    """How columns become those of a format, in Python and in a terminal: as it works where that can be guessed."""
    in_file = f"in a --config file: datasets: {{{task}: {{path: ..., "
    pair = ("prompt", "completion")
    is_alpaca = {"instruction", "input"} <= set(columns) and not set(pair) & set(columns)
    answer = next((column for column in _NEAR["completion"] if column in columns), None)
    if pair in formats and is_alpaca and answer is not None:
        return (
            "Join them: dataset.map(lambda row: {'prompt': row['instruction'] + '\\n' + (row['input'] or ''), "
            f"'completion': row[{answer!r}]}}).",
            f'Join them {in_file}template: {{prompt: "{{instruction}}\\n{{input}}", completion: "{{{answer}}}"}}}}}}.',
        )
    for own in formats:
        names = {name: (name, *_NEAR.get(name, ())) for name in own}
        chosen = {next((column for column in names[name] if column in columns), None): name for name in own}
        if None not in chosen:
            renamed = {old: new for old, new in chosen.items() if old != new}
            mapping = ", ".join(f"{old}: {new}" for old, new in renamed.items())
            return (
                f"Rename them: Dataset.rename_columns({renamed}).",
                f"Rename them {in_file}columns: {{{mapping}}}}}}}.",
            )
    return (
        "Rename them, as in Dataset.rename_columns({'MY_QUESTION': 'prompt', 'MY_ANSWER': 'completion'}).",
        f"Rename them {in_file}columns: {{MY_QUESTION: prompt, MY_ANSWER: completion}}}}}}.",
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
    hashes = [content_hash(row) for row in _stored_rows(content)]
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


def _stored_rows(dataset: Dataset) -> Iterator[Mapping[str, Any]]:
    """A dataset's rows, with images as their encoded bytes, or else the path of their file."""
    if not any(require_decoding(feature) for feature in dataset.features.values()):
        yield from dataset
        return
    for batch in dataset.with_format("arrow").iter(batch_size=100):
        yield from batch.to_pylist()
