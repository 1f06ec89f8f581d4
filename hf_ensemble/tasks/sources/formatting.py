"""From a dataset's own columns to those of a task."""

import string
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset

from ...errors import TaskError
from ..columns import EXAMPLE_ID


def formatted(
    task: str,
    split: str,
    rows: Dataset,
    columns: Mapping[str, str] | Sequence[str] | None = None,
    template: Mapping[str, str] | str | None = None,
) -> Dataset:
    """Rename or keep columns, then make new ones by a template.

    Args:
        task (`str`): name of the task, for errors.
        split (`str`): the split, for errors.
        rows (`Dataset`): the dataset's rows.
        columns (`dict[str, str]` or `list[str]`, *optional*): see [`DatasetSource`].
        template (`dict[str, str]` or `str`, *optional*): see [`DatasetSource`].

    Raises:
        `TaskError`: for columns that the dataset lacks, and templates that cannot be read.
    """
    if columns is not None:
        rows = _renamed(task, split, rows, columns)
    if template is not None:
        rows = _templated(task, split, rows, {"text": template} if isinstance(template, str) else template)
    return rows


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
    in_the_way = [new for old, new in columns.items() if new in rows.column_names and new not in columns and new != old]
    changed = {old: new for old, new in columns.items() if old != new}
    return rows.remove_columns(in_the_way).rename_columns(changed) if changed else rows


def _templated(task: str, split: str, rows: Dataset, template: Mapping[str, str]) -> Dataset:
    for column, text in template.items():
        try:
            parts = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
        except ValueError as error:
            raise TaskError(
                f"Dataset {task!r}: the template of {column!r}, {text!r:.60}, cannot be read ({error}). Write braces "
                "that are meant as such twice: {{ and }}."
            ) from error
        named = [part.split(".")[0].split("[")[0] for part in parts]
        lacking = [name for name in named if name not in rows.column_names]
        if lacking:
            raise TaskError(
                f"Dataset {task!r}, split {split!r}: the template of {column!r} names the columns {lacking}, found "
                f"{rows.column_names}. Correct the template."
            )
    names = {column: feature for column, feature in rows.features.items() if isinstance(feature, ClassLabel)}

    def make(row: Mapping[str, Any]) -> dict[str, str]:
        # Labels by their names, and nothing where there is nothing.
        shown = {
            key: names[key].int2str(value) if key in names and value is not None and value >= 0 else value
            for key, value in row.items()
        }
        return {column: text.format(**shown) for column, text in template.items()}

    rows = rows.with_format(None)
    kept = {EXAMPLE_ID: rows[EXAMPLE_ID][:]} if EXAMPLE_ID in rows.column_names else {}
    made = [make(row) for row in rows]
    return Dataset.from_dict({**{column: [row[column] for row in made] for column in template}, **kept})
