"""`TaskSet`: many named datasets as one table."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, Value, concatenate_datasets

from .._settings import check_number, checked_mapping, checked_names
from ..errors import TaskError
from .columns import EXAMPLE_ID
from .labels import LabelSpace
from .row_checks import check_rows
from .rows import RowFormat, add_identity, detect_format, label_names_of

SPLITS = ("train", "validation", "test")
_SPLIT_ALIASES = {"validation": ("validation", "eval", "dev", "valid"), "train": ("train",), "test": ("test",)}
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
            Rows of the splits `"train"`, `"validation"` and optionally `"test"`, with the columns `task` and
            `example_id`.
        row_format (`RowFormat`): format of the rows.
        label_names (`tuple[str, ...]`, *optional*): label names of a classification task.
        fingerprints (`dict[str, str]`, *optional*): fingerprint of each split's rows and their order.
    """

    name: str
    splits: Mapping[str, Dataset]
    row_format: RowFormat
    label_names: tuple[str, ...] | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)


class TaskSet(Mapping[str, Task]):
    """Named tasks with the same row format: a mapping from name to [`Task`], and one table per split.

    Args:
        tasks (`Iterable[Task]`): tasks, as created by [`TaskSet.from_datasets`].
        sampling_weights (`dict[str, float]`, *optional*):
            Relative weight with which the examples of a task are sampled in training. 1 by default.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from hf_ensemble import TaskSet

    >>> rows = [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "1 + 2 =", "completion": " 3"}]
    >>> tasks = TaskSet.from_datasets({"sums": Dataset.from_list(rows)}, {"sums": Dataset.from_list(rows[:1])})
    >>> tasks.table("train")["task"][:]
    ['sums', 'sums']
    ```
    """

    def __init__(self, tasks: Iterable[Task], sampling_weights: Mapping[str, float] | None = None):
        self._tasks: dict[str, Task] = {}
        for task in tasks:
            if not isinstance(task, Task):
                raise TaskError(f"Expected tasks, found {task!r:.60}. Make them with TaskSet.from_datasets.")
            check_task_name(task.name)
            self._check_clash(task.name)
            self._tasks[task.name] = task
        if not self._tasks:
            raise TaskError("Expected at least one task, found none.")
        formats = {task.row_format for task in self._tasks.values()}
        if len(formats) > 1:
            found = {task.name: task.row_format.value for task in self._tasks.values()}
            raise TaskError(f"Expected tasks with the same row format, found {found}. Convert them to one format.")
        self.row_format = formats.pop()
        self.sampling_weights = self._check_weights(sampling_weights or {})

    def _check_clash(self, name: str) -> None:
        clash = next((other for other in self._tasks if other.lower() == name.lower()), None)
        if clash is not None:
            raise TaskError(f"Two tasks with the same name: {clash!r} and {name!r} (case is ignored). Rename one.")

    def _check_weights(self, weights: Mapping[str, float]) -> dict[str, float]:
        checked_mapping("sampling_weights", weights, TaskError)
        checked_names("tasks in sampling_weights", weights, self, TaskError)
        for name, weight in weights.items():
            what = f"The sampling weight of {name!r} (drop a task instead of weighting it 0)"
            check_number(what, weight, 0, above=True, error=TaskError)
        return {name: float(weights.get(name, 1.0)) for name in self._tasks}

    @classmethod
    def from_datasets(
        cls,
        train: "Mapping[str, Dataset | Mapping[str, Dataset]] | Iterable[tuple[str, Dataset]]",
        validation: Mapping[str, Dataset] | None = None,
        test: Mapping[str, Dataset] | None = None,
        sampling_weights: Mapping[str, float] | None = None,
    ) -> "TaskSet":
        """Create tasks from named datasets.

        Args:
            train (`dict[str, Dataset]`, `dict[str, DatasetDict]` or pairs of name and dataset):
                Training rows of each task, or a `DatasetDict` of its splits ("eval", "dev" and "valid" are accepted for
                "validation"). A dataset may be a list of dicts.
            validation (`dict[str, Dataset]`, *optional*): evaluation rows of tasks, if `train` has none.
            test (`dict[str, Dataset]`, *optional*): held-out rows, which no choice depends on.
            sampling_weights (`dict[str, float]`, *optional*): see [`TaskSet`].

        Raises:
            `TaskError`: for unknown columns, empty tasks, repeated names, labels outside the task's set, tasks without
                evaluation rows, and evaluation rows of unknown tasks.
        """
        pairs = _named_pairs(train)
        names = [name for name, _ in pairs]
        for name in names:
            check_task_name(name)
        if len(set(names)) < len(names):
            raise TaskError(
                f"Two tasks with the same name: {next(n for n in names if names.count(n) > 1)!r}. Rename one."
            )
        given = {"validation": validation or {}, "test": test or {}}
        for split, datasets in given.items():
            unknown = sorted(set(checked_mapping(f"the {split} rows", datasets, TaskError)) - set(names))
            if unknown:
                raise TaskError(f"The {split} rows name tasks without training rows: {unknown}; the tasks are {names}.")
        tasks = []
        for name, source in pairs:
            splits = _splits_of(name, source)
            splits.update({split: as_dataset(name, d[name]) for split, d in given.items() if name in d})
            tasks.append(make_task(name, splits))
        return cls(tasks, sampling_weights)

    def __getitem__(self, name: str) -> Task:
        return self._tasks[name]

    def __iter__(self):
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tasks)

    @property
    def label_space(self) -> LabelSpace | None:
        """Labels of classification tasks; `None` for other tasks."""
        if self.row_format is not RowFormat.CLASSIFICATION:
            return None
        return LabelSpace.from_label_names({name: task.label_names for name, task in self._tasks.items()})

    def has_split(self, split: str) -> bool:
        return all(split in task.splits for task in self._tasks.values())

    def split(self, split: str) -> dict[str, Dataset]:
        """Rows of a split by task.

        Raises:
            `TaskError`: if a task does not have the split.
        """
        lacking = [name for name, task in self._tasks.items() if split not in task.splits]
        if lacking:
            raise TaskError(f"Expected {split!r} rows of every task, found none of {lacking}.")
        return {name: task.splits[split] for name, task in self._tasks.items()}

    def table(self, split: str) -> Dataset:
        """Rows of a split in one table, task by task."""
        try:
            return concatenate_datasets(list(self.split(split).values()))
        except ValueError as error:
            raise TaskError(f"The {split!r} rows of the tasks cannot be concatenated: {error}") from error

    def subset(self, names: Iterable[str]) -> "TaskSet":
        """The given tasks, in the order of this set."""
        names = {names} if isinstance(names, str) else set(names)
        checked_names("tasks", names, self, TaskError)
        kept = [task for name, task in self._tasks.items() if name in names]
        return TaskSet(kept, {task.name: self.sampling_weights[task.name] for task in kept})

    def without(self, examples: Mapping[str, Iterable[str]]) -> "TaskSet":
        """The same tasks without some training rows.

        Args:
            examples (`dict[str, Iterable[str]]`):
                Example ids by task, such as the results of [`ExampleScores.worst`] and [`DataSelector.left_out`].

        Raises:
            `TaskError`: for unknown tasks or ids, and when a task has no rows left.
        """
        unknown = sorted(set(examples) - set(self._tasks))
        if unknown:
            raise TaskError(f"Unknown tasks {unknown}; the tasks are {list(self._tasks)}.")
        kept = []
        for task in self._tasks.values():
            dropped = set(examples.get(task.name, ()))
            ids = task.splits["train"][EXAMPLE_ID]
            foreign = sorted(dropped - set(ids))
            if foreign:
                raise TaskError(f"Task {task.name!r} has no training rows with the ids {foreign[:5]}.")
            rows = [index for index, example in enumerate(ids) if example not in dropped]
            if not rows:
                raise TaskError(f"Task {task.name!r} has no training rows left. Remove the task with subset instead.")
            if dropped:
                train, fingerprint = add_identity(
                    task.name, "train", task.splits["train"].select(rows), task.row_format
                )
                task = replace(
                    task,
                    splits={**task.splits, "train": train},
                    fingerprints={**task.fingerprints, "train": fingerprint},
                )
            kept.append(task)
        return TaskSet(kept, self.sampling_weights)

    def reweighted(self, sampling_weights: Mapping[str, float]) -> "TaskSet":
        """The same tasks with other sampling weights."""
        return TaskSet(self._tasks.values(), sampling_weights)

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that depend only on the rows of all splits."""
        parts = [f"{n}/{s}={f}" for n, task in self._tasks.items() for s, f in sorted(task.fingerprints.items())]
        parts += [f"{n}: {'|'.join(task.label_names)}" for n, task in self._tasks.items() if task.label_names]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()

    def to_dict(self) -> dict:
        """Row format, fingerprints, and sizes, labels and sampling weight of each task, as JSON values."""
        return {
            "row_format": self.row_format.value,
            "fingerprint": self.fingerprint,
            "tasks": {
                name: {
                    "num_rows": {split: len(rows) for split, rows in task.splits.items()},
                    "fingerprints": dict(task.fingerprints),
                    "label_names": None if task.label_names is None else list(task.label_names),
                    "sampling_weight": self.sampling_weights[name],
                }
                for name, task in self._tasks.items()
            },
        }


def check_task_name(name: str) -> None:
    """Raise `TaskError` for a name that is no plain folder name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > _MAX_NAME:
        raise TaskError(
            f"Task name {name!r:.120} cannot be used as a folder name: use letters, digits, '_', '-' and '.', start "
            f"with a letter or digit, and take at most {_MAX_NAME} characters."
        )


def _named_pairs(train) -> list[tuple[str, Any]]:
    """Pairs of a name and a dataset."""
    pairs = train.items() if isinstance(train, Mapping) else train
    is_table = isinstance(train, (str, Dataset, IterableDataset)) or not isinstance(pairs, Iterable)
    pairs = [] if is_table else list(pairs)
    if is_table or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise TaskError(
            f"Expected the training rows as a dict of named datasets, found a {type(train).__name__}. Pass "
            "{name: dataset}."
        )
    return pairs


def make_task(name: str, splits: Mapping[str, Dataset]) -> Task:
    """Create a task from its splits. Raises like [`TaskSet.from_datasets`]."""
    for split in ("train", "validation"):
        if split not in splits:
            what = "evaluation" if split == "validation" else "training"
            raise TaskError(f"Task {name!r} has no {what} rows: expected a split {split!r}, found {sorted(splits)}.")
    for split, rows in splits.items():
        if len(rows) == 0:
            raise TaskError(f"Task {name!r} is empty: split {split!r} has no rows.")
    row_format = detect_format(name, splits["train"].column_names)
    for split, rows in splits.items():
        lacking = [column for column in row_format.required if column not in rows.column_names]
        if lacking:
            raise TaskError(
                f"Task {name!r}, split {split!r}: expected the columns {list(row_format.required)} like the training "
                f"rows ({row_format.value}), found {rows.column_names}, which lack {lacking}."
            )
    for split, rows in splits.items():
        check_rows(name, split, rows, row_format)
    label_names = label_names_of(name, splits) if row_format is RowFormat.CLASSIFICATION else None
    splits = {split: _plain_columns(rows) for split, rows in splits.items()}
    identified = {split: add_identity(name, split, rows, row_format) for split, rows in splits.items()}
    return Task(
        name,
        {split: rows for split, (rows, _) in identified.items()},
        row_format,
        label_names,
        {split: fingerprint for split, (_, fingerprint) in identified.items()},
    )


def _plain_columns(rows: Dataset) -> Dataset:
    """Cast labels to plain integers and texts to plain strings, so that tables can be concatenated."""
    label = rows.features.get("label")
    if isinstance(label, Value) and label.dtype == "bool":
        rows = rows.cast_column("label", Value("int64"))
    for column in ("label", "text", "label_text", "prompt", "completion"):
        feature = rows.features.get(column)
        if isinstance(feature, ClassLabel) or (isinstance(feature, Value) and feature.dtype in _OTHER_WIDTHS):
            rows = rows.cast_column(column, Value("int64" if column == "label" else "string"))
    return rows


def table_error(where: str, error: Exception) -> TaskError:
    """The error for rows whose values cannot stand in one column."""
    reason = " ".join(str(error).split())
    return TaskError(
        f"{where}: its rows do not form one table ({reason}). Expected the same kind of value in a column in all rows."
    )


def as_dataset(name: str, source) -> Dataset:
    """Convert a list of dicts to a dataset, and pass datasets through. Raises `TaskError` for anything else."""
    if isinstance(source, Dataset):
        return source
    if isinstance(source, list):
        odd = next((row for row in source if not isinstance(row, Mapping)), None)
        if odd is not None:
            raise TaskError(f"Task {name!r}: expected each row as a dict, found {odd!r:.60}.")
        try:
            return Dataset.from_list(source)
        except Exception as error:  # pyarrow raises unrelated exception classes here
            raise table_error(f"Task {name!r}", error) from error
    advice = " Load it with streaming=False." if isinstance(source, IterableDataset) else ""
    raise TaskError(
        f"Task {name!r}: expected a datasets.Dataset or a list of dicts, found {type(source).__name__}.{advice}"
    )


def _splits_of(name: str, source) -> dict[str, Dataset]:
    if not isinstance(source, (DatasetDict, Mapping)):
        return {"train": as_dataset(name, source)}
    splits = {}
    for split, aliases in _SPLIT_ALIASES.items():
        for alias in aliases:
            if alias in source:
                splits.setdefault(split, as_dataset(name, source[alias]))
    return splits
