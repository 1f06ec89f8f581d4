"""Rows that a run's trainer is asked to evaluate or to predict, by task."""

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset

from ..._settings import checked_mapping
from ...errors import TaskError
from ...tasks import IGNORE_INDEX, META_COLUMNS, TASK, RowFormat, TaskSet
from ...tasks.class_labels import HIDDEN, are_hidden
from ...tasks.task import as_dataset
from .datasets import is_table_of_tasks, rows_by_task

_LABEL_COLUMNS = {RowFormat.CLASSIFICATION: "label", RowFormat.TOKENIZED: "labels"}


def labelled_test_rows(tasks: TaskSet) -> dict[str, Dataset] | None:
    """The test rows by task; `None` unless every task has some, with labels."""
    rows = tasks.split("test") if tasks.has_split("test") else None
    return None if rows is None or any(map(are_hidden, rows.values())) else rows


def token_tables(
    given: Any,
    tasks: TaskSet,
    prepare: Callable[[Mapping[str, Dataset]], dict[str, Dataset]],
    needs_labels: bool = True,
) -> dict[str, Dataset]:
    """Rows as token tables with `task` and `example_id`, by task.

    Args:
        given (`dict[str, Dataset]` or `Dataset`):
            Rows of each task; or one dataset whose column `task` tells them apart. Token tables that the trainer has
            made are taken as they are.
        tasks (`TaskSet`): the tasks.
        prepare (`Callable`): from raw rows of known tasks to token tables.
        needs_labels (`bool`, *optional*, defaults to `True`):
            Whether rows need answers. Without, a classifier's rows may lack the label, or have -1 for each.

    Raises:
        `TaskError`: for one dataset without tasks, and for what `prepare` refuses.
    """
    by_task = _by_task(given, tasks)
    ready = {name for name, rows in by_task.items() if name in tasks and _is_token_table(rows)}
    raw = {name: rows for name, rows in by_task.items() if name not in ready}
    unlabelled = set() if needs_labels else {name for name, rows in raw.items() if _lacks_labels(rows, tasks)}
    raw = {name: _with_some_label(rows, name, tasks) if name in unlabelled else rows for name, rows in raw.items()}
    made = prepare(raw) if raw or not ready else {}
    made = {name: rows.remove_columns("labels") if name in unlabelled else rows for name, rows in made.items()}
    return {name: made.get(name, rows) for name, rows in by_task.items()}


def tokens_of_tasks(rows: Dataset, name: str | None, tasks: TaskSet, needs_labels: bool) -> Dataset:
    """Rows of tokens for a classifier of texts, with their task, which says what labels they may have.

    Args:
        rows (`Dataset`): rows of tokens, as the user has made them.
        name (`str`, *optional*): the task of rows without one; any where all tasks have one label set.
        tasks (`TaskSet`): tasks of texts with labels.
        needs_labels (`bool`): whether rows need answers.

    Raises:
        `TaskError`: for rows of no known task, without a label, and with labels that are numbers of other outputs in
            their task.
    """
    space = tasks.label_space
    if TASK not in rows.column_names:
        name = tasks.names[0] if name not in tasks and space.is_shared else name
        rows = rows if name is None else rows.add_column(TASK, [name] * len(rows))
    names = rows.unique(TASK) if TASK in rows.column_names else []
    if not names or not set(names) <= set(tasks):
        raise TaskError(
            f"Expected rows of the tasks {list(tasks)}, whose labels differ, found {names or 'rows without a task'}. "
            f"Pass {{{tasks.names[0]!r}: rows}}, or the task of each row in the column {TASK!r}."
        )
    column = next((column for column in ("labels", "label") if column in rows.column_names), None)
    found = [HIDDEN] * len(rows) if column is None else rows.with_format(None)[column][:]
    rows = rows if column is None else rows.remove_columns(column)
    if all(label == HIDDEN for label in found):
        if needs_labels:
            raise TaskError(f"Tasks {names}: expected rows of tokens with a class in 'labels', found none. Add it.")
        return rows
    for name in names:
        if space.task_labels[name] != tuple(range(len(space.task_labels[name]))):
            raise TaskError(
                f"Task {name!r}: its labels are the outputs {list(space.task_labels[name])} of the model's head, and "
                "numbers beside tokens may be of either. Pass its rows as text with labels."
            )
    return rows.add_column("labels", [IGNORE_INDEX if label == HIDDEN else label for label in found])


def positions_by_task(given: Any) -> list[int] | None:
    """Where each row of a table of several tasks stands once they are taken apart; `None` for rows by task."""
    if not is_table_of_tasks(given):
        return None
    tasks = given.with_format(None)[TASK][:]
    first = {name: number for number, name in enumerate(dict.fromkeys(tasks))}
    apart = sorted(range(len(tasks)), key=lambda row: first[tasks[row]])
    return sorted(range(len(tasks)), key=apart.__getitem__)


def _by_task(given: Any, tasks: TaskSet) -> Mapping[str, Any]:
    if not isinstance(given, Dataset | list):
        return checked_mapping("eval_dataset", given, TaskError)
    rows = as_dataset("all", given)
    if TASK not in rows.column_names:
        raise TaskError(
            f"Expected a dict with the rows of each task, such as {{{tasks.names[0]!r}: rows}}, or one dataset with "
            f"the task of each row in the column {TASK!r}; found one dataset with the columns {rows.column_names}."
        )
    return rows_by_task(rows)


def _is_token_table(rows: Any) -> bool:
    return isinstance(rows, Dataset) and {"input_ids", "labels", *META_COLUMNS} <= set(rows.column_names)


def _lacks_labels(rows: Any, tasks: TaskSet) -> bool:
    if tasks.row_format not in _LABEL_COLUMNS or not isinstance(rows, Dataset):
        return False
    column = _label_column(rows, tasks)
    return column is None or all(label == HIDDEN for label in rows[column])


def _label_column(rows: Dataset, tasks: TaskSet) -> str | None:
    """The column that holds the answers; a class may stand in `label` or in `labels`."""
    own = _LABEL_COLUMNS[tasks.row_format]
    return next((column for column in (own, "label", "labels") if column in rows.column_names), None)


def _with_some_label(rows: Dataset, name: str, tasks: TaskSet) -> Dataset:
    """Rows with a label that nothing reads, since rows are checked and encoded with one."""
    hidden, column = _label_column(rows, tasks), _LABEL_COLUMNS[tasks.row_format]
    if hidden is not None:
        rows = rows.remove_columns(hidden)
    is_class = name not in tasks or not isinstance(tasks[name].splits["train"][0][column], list)
    return rows.add_column(column, [0] * len(rows) if is_class else rows["input_ids"][:])
