"""From a dataset's own columns to those of a task."""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

from datasets import ClassLabel, Dataset

from ...errors import TaskError
from ..columns import EXAMPLE_ID


def formatted(
    task: str,
    split: str,
    rows: Dataset,
    columns: Mapping[str, str] | Sequence[str] | None,
    templates: Mapping[str, str],
) -> Dataset:
    """Rename or keep columns, then make new ones by a template.

    Args:
        task (`str`): name of the task, for errors.
        split (`str`): the split, for errors.
        rows (`Dataset`): the dataset's rows.
        columns (`dict[str, str]`, `list[str]` or `None`): see [`DatasetSource`].
        templates (`dict[str, str]`): template of each new column; without any, the columns stay.

    Raises:
        `TaskError`: for columns that the dataset lacks, and rows that a template does not fit or finds nothing in.
    """
    if columns is not None:
        rows = _renamed(task, split, rows, columns)
    return _templated(task, split, rows, templates) if templates else rows


def _renamed(task: str, split: str, rows: Dataset, columns: Mapping[str, str] | Sequence[str]) -> Dataset:
    wanted = list(columns)
    lacking = [column for column in wanted if column not in rows.column_names]
    if lacking:
        new = set(columns.values()) if isinstance(columns, Mapping) else set()
        turned = " Names of the dataset stand first, new ones second." if new & set(rows.column_names) else ""
        raise TaskError(
            f"Dataset {task!r}, split {split!r}: columns names {lacking}, found {rows.column_names}.{turned} Correct "
            "columns."
        )
    if not isinstance(columns, Mapping):
        return rows.select_columns([*wanted, *([EXAMPLE_ID] if EXAMPLE_ID in rows.column_names else [])])
    repeated = [new for new, count in Counter(columns.values()).items() if count > 1]
    if repeated:
        raise TaskError(
            f"Dataset {task!r}: columns gives several columns the name {repeated[0]!r}, found {dict(columns)}. Name "
            "one of them so, or join them with a template."
        )
    in_the_way = [new for old, new in columns.items() if new in rows.column_names and new not in columns and new != old]
    changed = {old: new for old, new in columns.items() if old != new}
    return rows.remove_columns(in_the_way).rename_columns(changed) if changed else rows


def template_fields(text: str) -> dict[str, str]:
    """Columns that a template's text names, each with its format: `""` where a value is shown as it stands.

    Raises:
        `ValueError`: for a text that cannot be read as a template.
    """
    found: dict[str, str] = {}
    for _, name, how, _ in string.Formatter().parse(text):
        if name is not None:
            column = re.split(r"[.\[]", name)[0]
            found[column] = found.get(column) or how
    return found


class _Nothing:
    """What stands for a missing value in a template: no text, whatever is asked of it."""

    def __format__(self, how: str) -> str:
        return ""

    def __repr__(self) -> str:
        return ""

    def __getattr__(self, name: str) -> "_Nothing":
        return self

    def __getitem__(self, key: Any) -> "_Nothing":
        return self


_NOTHING = _Nothing()


def _templated(task: str, split: str, rows: Dataset, templates: Mapping[str, str]) -> Dataset:
    named = {column: list(template_fields(text)) for column, text in templates.items()}
    for column, names in named.items():
        lacking = [name for name in names if name not in rows.column_names]
        if lacking:
            raise TaskError(
                f"Dataset {task!r}, split {split!r}: the template of {column!r} names the columns {lacking}, found "
                f"{rows.column_names}. Correct the template; braces that are meant as such are written twice."
            )
    labels = {column: feature for column, feature in rows.features.items() if isinstance(feature, ClassLabel)}
    rows = rows.with_format(None)
    made: dict[str, list[str]] = {column: [] for column in templates}
    for number, row in enumerate(rows):
        shown = {key: _shown(value, labels.get(key)) for key, value in row.items()}
        for column, text in templates.items():
            where = f"Dataset {task!r}, split {split!r}, row {number} (counted from 0): the template of {column!r}"
            values = [shown[name] for name in named[column]]
            if values and all(value is _NOTHING for value in values):
                raise TaskError(
                    f"{where} has nothing to show: expected a value in {' or '.join(map(repr, named[column]))}, found "
                    "none. Correct the row or drop it."
                )
            try:
                made[column].append(text.format(**shown))
            except (LookupError, ValueError, TypeError, AttributeError) as error:
                found = {name: row[name] for name in named[column]}
                raise TaskError(
                    f"{where}, {text!r:.60}, does not fit {found!r:.120} ({type(error).__name__}: {error}). Correct "
                    "the template."
                ) from error
    kept = {EXAMPLE_ID: rows[EXAMPLE_ID][:]} if EXAMPLE_ID in rows.column_names else {}
    return Dataset.from_dict({**made, **kept})


def _shown(value: Any, label: ClassLabel | None) -> Any:
    """A value as a template sees it: labels by their names, and nothing where there is nothing."""
    is_missing = value is None or (isinstance(value, float) and isnan(value))
    if is_missing or (label is not None and isinstance(value, int) and value < 0):
        return _NOTHING
    return value if label is None else label.int2str(value)
