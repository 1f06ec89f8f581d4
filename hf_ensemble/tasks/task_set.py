"""`TaskSet`: many named datasets as one table."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from datasets import ClassLabel, Dataset, DatasetDict, Value, concatenate_datasets

from .._values import plain_values
from ..errors import TaskError
from .columns import EXAMPLE_ID
from .hold_out import hold_out
from .labels import LabelSpace
from .rows import RowFormat, add_identity, detect_format, label_names_of

SPLITS = ("train", "validation", "test")
_SPLIT_ALIASES = {"validation": ("validation", "eval", "dev", "valid"), "train": ("train",), "test": ("test",)}
# Other widths of a type, which cannot be concatenated.
_OTHER_WIDTHS = ("large_string", "string_view", "int8", "int16", "int32", "uint8", "uint16", "uint32")
# Task names become folder names of adapters, parts of metric names and repository paths.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Task:
    """One named dataset.

    Args:
        name (`str`): task name.
        splits (`dict[str, Dataset]`):
            Rows of the splits `"train"` and optionally `"validation"` and `"test"`, with the columns `task` and
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
            self._check_name(task.name)
            self._tasks[task.name] = task
        if not self._tasks:
            raise TaskError("Expected at least one task, found none.")
        formats = {task.row_format for task in self._tasks.values()}
        if len(formats) > 1:
            found = {task.name: task.row_format.value for task in self._tasks.values()}
            raise TaskError(f"Expected tasks with the same row format, found {found}. Convert them to one format.")
        self.row_format = formats.pop()
        self.sampling_weights = self._check_weights(sampling_weights or {})

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise TaskError(
                f"Task name {name!r} cannot be used as a folder name: use letters, digits, '_', '-' and '.', and start "
                "with a letter or digit."
            )
        clash = next((other for other in self._tasks if other.lower() == name.lower()), None)
        if clash is not None:
            raise TaskError(f"Two tasks with the same name: {clash!r} and {name!r} (case is ignored). Rename one.")

    def _check_weights(self, weights: Mapping[str, float]) -> dict[str, float]:
        unknown = sorted(set(weights) - set(self._tasks))
        if unknown:
            raise TaskError(f"The sampling weights name unknown tasks {unknown}; the tasks are {list(self._tasks)}.")
        full = {name: float(weights.get(name, 1.0)) for name in self._tasks}
        if any(not 0 < w < float("inf") for w in full.values()):
            raise TaskError(
                f"Sampling weights have to be positive and finite, found {full}. Drop a task instead of weighting it 0."
            )
        return full

    @classmethod
    def from_datasets(
        cls,
        train: "Mapping[str, Dataset | Mapping[str, Dataset]] | Iterable[tuple[str, Dataset]]",
        validation: Mapping[str, Dataset] | None = None,
        test: Mapping[str, Dataset] | None = None,
        sampling_weights: Mapping[str, float] | None = None,
        row_format: RowFormat | None = None,
    ) -> "TaskSet":
        """Create tasks from named datasets.

        Evaluation rows may be lacking: [`TaskSet.with_validation`] holds some out.

        Args:
            train (`dict[str, Dataset]`, `dict[str, DatasetDict]` or pairs of name and dataset):
                Training rows of each task, or a `DatasetDict` of its splits ("eval", "dev" and "valid" are accepted for
                "validation"). A dataset may be a list of dicts.
            validation (`dict[str, Dataset]`, *optional*): evaluation rows of tasks, if `train` has none.
            test (`dict[str, Dataset]`, *optional*): held-out rows, which no choice depends on.
            sampling_weights (`dict[str, float]`, *optional*): see [`TaskSet`].
            row_format (`RowFormat`, *optional*): format of the rows; detected from their columns by default.

        Raises:
            `TaskError`: for unknown columns, empty tasks, repeated names, labels outside the task's set, and evaluation
                rows of unknown tasks.
        """
        pairs = list(train.items() if isinstance(train, Mapping) else train)
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise TaskError(
                f"Two tasks with the same name: {next(n for n in names if names.count(n) > 1)!r}. Rename one."
            )
        given = {"validation": validation or {}, "test": test or {}}
        for split, datasets in given.items():
            unknown = sorted(set(datasets) - set(names))
            if unknown:
                raise TaskError(f"The {split} rows name tasks without training rows: {unknown}; the tasks are {names}.")
        tasks = []
        for name, source in pairs:
            splits = splits_of(name, source)
            splits.update({split: as_dataset(name, d[name]) for split, d in given.items() if name in d})
            tasks.append(make_task(name, splits, row_format))
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
            remedy = " Pass them, or hold some out: tasks.with_validation()." if split == "validation" else ""
            raise TaskError(f"Expected {split!r} rows of every task, found none of {lacking}.{remedy}")
        return {name: task.splits[split] for name, task in self._tasks.items()}

    def table(self, split: str) -> Dataset:
        """Rows of a split in one table, task by task."""
        try:
            return concatenate_datasets(list(self.split(split).values()))
        except ValueError as error:
            raise TaskError(f"The {split!r} rows of the tasks cannot be concatenated: {error}") from error

    def subset(self, names: Iterable[str]) -> "TaskSet":
        """The given tasks, in the order of this set."""
        names = set(names)
        unknown = sorted(names - set(self._tasks))
        if unknown:
            raise TaskError(f"Unknown tasks {unknown}; the tasks are {list(self._tasks)}.")
        kept = [task for name, task in self._tasks.items() if name in names]
        return TaskSet(kept, {task.name: self.sampling_weights[task.name] for task in kept})

    def with_validation(self, fraction: float = 0.1, seed: int = 0) -> "TaskSet":
        """The same tasks, each with validation rows: where there are none, a share of the training rows is held out.

        Args:
            fraction (`float`, *optional*, defaults to 0.1):
                Share of a task's rows; at least 20 rows, at most 500 and never more than half of them.
            seed (`int`, *optional*, defaults to 0): seed of the draw, which does not depend on the rows' order.

        Raises:
            `TaskError`: for a task with a single row.
        """
        tasks = []
        for task in self._tasks.values():
            if "validation" not in task.splits:
                parts = hold_out(task.name, task.splits["train"], fraction, seed)
                task = _with_splits(task, dict(zip(("train", "validation"), parts)))
            tasks.append(task)
        return TaskSet(tasks, self.sampling_weights)

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
            kept.append(_with_splits(task, {"train": task.splits["train"].select(rows)}) if dropped else task)
        return TaskSet(kept, self.sampling_weights)

    def reweighted(self, sampling_weights: Mapping[str, float]) -> "TaskSet":
        """The same tasks with other sampling weights."""
        return TaskSet(self._tasks.values(), sampling_weights)

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that depend only on the rows of all splits and on the labels' names."""
        parts = [(name, sorted(task.fingerprints.items()), task.label_names) for name, task in self._tasks.items()]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

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


def _with_splits(task: Task, changed: Mapping[str, Dataset]) -> Task:
    """A task with other rows in some of its splits."""
    identified = {split: add_identity(task.name, split, rows, task.row_format) for split, rows in changed.items()}
    return replace(
        task,
        splits={**task.splits, **{split: rows for split, (rows, _) in identified.items()}},
        fingerprints={**task.fingerprints, **{split: fingerprint for split, (_, fingerprint) in identified.items()}},
    )


def make_task(name: str, splits: Mapping[str, Dataset], row_format: RowFormat | None = None) -> Task:
    """Create a task from its splits. Raises like [`TaskSet.from_datasets`]."""
    if "train" not in splits:
        raise TaskError(f"Task {name!r} has no training rows: expected a split 'train', found {sorted(splits)}.")
    for split, rows in splits.items():
        if len(rows) == 0:
            raise TaskError(f"Task {name!r} is empty: split {split!r} has no rows.")
    splits = {split: _without_format(rows) for split, rows in splits.items()}
    row_format = row_format or detect_format(name, splits["train"].column_names)
    for split, rows in splits.items():
        lacking = [column for column in row_format.required if column not in rows.column_names]
        if lacking:
            raise TaskError(
                f"Task {name!r}, split {split!r}: expected the columns {list(row_format.required)} like the training "
                f"rows ({row_format.value}), found {rows.column_names}, which lack {lacking}."
            )
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


def _without_format(rows: Dataset) -> Dataset:
    """The same values, read as Python's own, whatever `set_format` asks for; what `set_transform` makes of them."""
    if rows.format["type"] != "custom":
        return rows.with_format(None)
    made = Dataset.from_list([plain_values(row) for row in rows])
    for column, feature in rows.features.items():
        if isinstance(feature, ClassLabel) and column in made.column_names:
            made = made.cast_column(column, feature)
    return made


def _plain_columns(rows: Dataset) -> Dataset:
    """Cast labels to plain integers and texts to plain strings, so that tables can be concatenated."""
    for column in ("label", "text", "label_text", "prompt", "completion"):
        feature = rows.features.get(column)
        if isinstance(feature, ClassLabel) or (isinstance(feature, Value) and feature.dtype in _OTHER_WIDTHS):
            rows = rows.cast_column(column, Value("int64" if column == "label" else "string"))
    return rows


def as_dataset(name: str, source) -> Dataset:
    """Convert a list of dicts to a dataset, and pass datasets through. Raises `TaskError` for anything else."""
    if isinstance(source, Dataset):
        return source
    if isinstance(source, list):
        try:
            return Dataset.from_list(source)
        except Exception as error:  # pyarrow raises unrelated exception classes here
            raise TaskError(f"Task {name!r}: its rows do not form one table: {error}") from error
    raise TaskError(f"Task {name!r}: expected a datasets.Dataset or a list of dicts, found {type(source).__name__}.")


def splits_of(name: str, source) -> dict[str, Dataset]:
    """The splits of one dataset by their usual names; a dataset without splits is its training rows."""
    if not isinstance(source, (DatasetDict, Mapping)):
        return {"train": as_dataset(name, source)}
    splits = {}
    for split, aliases in _SPLIT_ALIASES.items():
        for alias in aliases:
            if alias in source:
                splits.setdefault(split, as_dataset(name, source[alias]))
    return splits
