"""One named dataset: its splits, their format and identity."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import ClassLabel, Dataset, Features, IterableDataset, Value

from .._values import plain_values
from ..errors import TaskError
from .class_labels import numbered_labels
from .columns import renamed_class
from .row_checks import check_rows
from .rows import RowFormat, add_identity, detect_format

SPLITS = ("train", "validation", "test")
SPLIT_ALIASES = {"validation": ("validation", "eval", "dev", "valid"), "train": ("train",), "test": ("test",)}
# Other widths of a type, which cannot be concatenated.
_OTHER_WIDTHS = ("large_string", "string_view", "int8", "int16", "int32", "uint8", "uint16", "uint32")
# Task names become folder names of adapters, parts of metric names and repository paths.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# File systems take names of 255 bytes; prefixes and suffixes are added.
_MAX_NAME = 128


@dataclass(frozen=True)
class Task:
    """One named dataset.

    Args:
        name (`str`): task name.
        splits (`dict[str, Dataset]`):
            Rows of the splits `"train"` and optionally `"validation"` and `"test"`, with the columns `task` and
            `example_id`.
        row_format (`RowFormat`): format of the rows.
        label_names (`tuple[str, ...]`, *optional*):
            Label names of a classification task; `None` where each row has several labels.
        fingerprints (`dict[str, str]`, *optional*): fingerprint of each split's rows and their order.
        is_streamed (`bool`, *optional*, defaults to `False`):
            Whether trainings go on to further training rows, of which these are the first.
    """

    name: str
    splits: Mapping[str, Dataset]
    row_format: RowFormat
    label_names: tuple[str, ...] | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    is_streamed: bool = False


def with_splits(task: Task, changed: Mapping[str, Dataset]) -> Task:
    """A task with other rows in some of its splits."""
    identified = {split: add_identity(task.name, split, rows, task.row_format) for split, rows in changed.items()}
    return replace(
        task,
        splits={**task.splits, **{split: rows for split, (rows, _) in identified.items()}},
        fingerprints={**task.fingerprints, **{split: fingerprint for split, (_, fingerprint) in identified.items()}},
    )


def check_task_name(name: str) -> None:
    """Raise `TaskError` for a name that is no plain folder name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > _MAX_NAME:
        raise TaskError(
            f"Task name {name!r:.120} cannot be used as a folder name: use letters, digits, '_', '-' and '.', start "
            f"with a letter or digit, and take at most {_MAX_NAME} characters."
        )


def make_task(
    name: str,
    splits: Mapping[str, Dataset],
    row_format: RowFormat | None = None,
    label_names: Sequence[str] | None = None,
) -> Task:
    """Create a task from its splits, whose labels may have names already. Raises like [`TaskSet.from_datasets`]."""
    if "train" not in splits:
        raise TaskError(f"Task {name!r} has no training rows: expected a split 'train', found {sorted(splits)}.")
    for split, rows in splits.items():
        if len(rows) == 0:
            raise TaskError(f"Task {name!r} is empty: split {split!r} has no rows.")
    splits = {split: _without_format(name, rows) for split, rows in splits.items()}
    if row_format not in (RowFormat.TEXT, RowFormat.SFT):
        splits = {split: _with_class_labels(rows) for split, rows in splits.items()}
    row_format = row_format or detect_format(name, splits["train"].column_names)
    for split, rows in splits.items():
        lacking = [column for column in row_format.required if column not in rows.column_names]
        if lacking:
            raise TaskError(
                f"Task {name!r}, split {split!r}: expected the columns {list(row_format.required)} like the training "
                f"rows ({row_format.value}), found {rows.column_names}, which lack {lacking}."
            )
    for split, rows in splits.items():
        check_rows(name, split, rows, row_format)
    names = None
    if row_format is RowFormat.CLASSIFICATION:
        splits, names = numbered_labels(name, splits, label_names)
    splits = {split: _plain_columns(rows) for split, rows in splits.items()}
    identified = {split: add_identity(name, split, rows, row_format) for split, rows in splits.items()}
    return Task(
        name,
        {split: rows for split, (rows, _) in identified.items()},
        row_format,
        names,
        {split: fingerprint for split, (_, fingerprint) in identified.items()},
    )


def _without_format(name: str, rows: Dataset) -> Dataset:
    """The same values, read as Python's own, whatever `set_format` asks for; what `set_transform` makes of them."""
    if rows.format["type"] != "custom":
        return rows.with_format(None)
    made = table_of([plain_values(row) for row in rows], f"Task {name!r}")
    for column, feature in rows.features.items():
        if isinstance(feature, ClassLabel) and column in made.column_names:
            made = made.cast_column(column, feature)
    return made


def _with_class_labels(rows: Dataset) -> Dataset:
    """Texts with a class in `labels`, as [`RowFormat`] has it, in `label`; tokens with one in `label` in `labels`."""
    renamed = renamed_class(rows.column_names)
    rows = rows.rename_columns(renamed)
    if "labels" not in renamed.values():
        return rows
    feature = rows.features["labels"]
    is_integer = isinstance(feature, ClassLabel) or getattr(feature, "dtype", None) in ("bool", *_OTHER_WIDTHS)
    return rows.cast_column("labels", Value("int64")) if is_integer else rows


def _plain_columns(rows: Dataset) -> Dataset:
    """Cast labels to plain integers and texts to plain strings, so that tables can be concatenated."""
    for column in ("label", "labels"):
        label = rows.features.get(column)
        if isinstance(label, Value) and label.dtype == "bool":
            rows = rows.cast_column(column, Value("int64"))
    for column in ("label", "labels", "text", "label_text", "prompt", "completion"):
        feature = rows.features.get(column)
        if isinstance(feature, ClassLabel) or (isinstance(feature, Value) and feature.dtype in _OTHER_WIDTHS):
            rows = rows.cast_column(column, Value("int64" if column in ("label", "labels") else "string"))
    return rows


def table_of(rows: Sequence[Mapping[str, Any]], where: str, features: Features | None = None) -> Dataset:
    """A dataset of rows, with the columns that any of them has: `from_list` takes those of the first.

    Args:
        rows (`Sequence[dict]`): the rows.
        where (`str`): what they are, for errors.
        features (`datasets.Features`, *optional*): types of the columns.

    Raises:
        `TaskError`: for rows whose values cannot stand in one column.
    """
    first = [{**dict.fromkeys(key for row in rows for key in row), **rows[0]}] if rows else []
    try:
        return Dataset.from_list([*first, *rows[1:]], features=features)
    except Exception as error:  # pyarrow raises unrelated exception classes here
        reason = " ".join(str(error).split())
        raise TaskError(
            f"{where}: its rows do not form one table ({reason}). Expected the same kind of value in a column in all "
            "rows."
        ) from error


def as_dataset(name: str, source) -> Dataset:
    """Convert a list of dicts to a dataset, and pass datasets through. Raises `TaskError` for anything else."""
    if isinstance(source, Dataset):
        return source
    if isinstance(source, list):
        odd = next((row for row in source if not isinstance(row, Mapping)), None)
        if odd is not None:
            raise TaskError(f"Task {name!r}: expected each row as a dict, found {odd!r:.60}.")
        return table_of(source, f"Task {name!r}")
    is_stream = isinstance(source, IterableDataset)
    advice = " Load it with streaming=False, or pass it to a trainer in a dict by name." if is_stream else ""
    raise TaskError(
        f"Task {name!r}: expected a datasets.Dataset or a list of dicts, found {type(source).__name__}.{advice}"
    )


def splits_of(name: str, source) -> dict[str, Dataset]:
    """The splits of one dataset by their usual names; a dataset without splits is its training rows."""
    return {split: as_dataset(name, rows) for split, rows in named_splits(source).items()}


def named_splits(source: Any) -> dict[str, Any]:
    """What stands for each split in a dataset with splits, by their usual names."""
    if not isinstance(source, Mapping):
        return {"train": source}
    found = {split: [alias for alias in aliases if alias in source] for split, aliases in SPLIT_ALIASES.items()}
    return {split: source[aliases[0]] for split, aliases in found.items() if aliases}
