"""`TaskSet`: many named datasets as one table."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Dataset, IterableDataset, Value, concatenate_datasets

from .._settings import check_at_least, check_number, checked_mapping, checked_names
from ..errors import TaskError
from .class_labels import is_float_list
from .columns import EXAMPLE_ID
from .hold_out import draw_out, hold_out
from .labels import LabelSpace
from .rows import RowFormat
from .task import Task, as_dataset, check_task_name, make_task, splits_of, with_splits


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
        if self.row_format is RowFormat.CLASSIFICATION:
            self._check_kinds_of_labels()
        self.sampling_weights = self._check_weights(sampling_weights or {})

    def _check_clash(self, name: str) -> None:
        clash = next((other for other in self._tasks if other.lower() == name.lower()), None)
        if clash is not None:
            raise TaskError(f"Two tasks with the same name: {clash!r} and {name!r} (case is ignored). Rename one.")

    def _check_kinds_of_labels(self) -> None:
        """Rows with several labels have those of one label set, in all tasks."""
        several = {name for name, task in self._tasks.items() if task.label_names is None}
        if not several:
            return
        sizes = {name: len(self[name].splits["train"][0]["label"]) if name in several else 1 for name in self._tasks}
        if len(set(sizes.values())) > 1:
            raise TaskError(
                "Rows with several labels are trained over one set of labels: expected lists of the same length in all "
                f"tasks, found {sizes} labels a row. Make them lists of zeros and ones over all labels."
            )

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
        row_format: RowFormat | str | None = None,
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
            row_format (`RowFormat` or `str`, *optional*):
                Format of the rows; detected from their columns by default. `"sft"` keeps all columns, for whatever else
                an `SFTTrainer` makes tokens of.

        Raises:
            `TaskError`: for unknown columns, empty tasks, repeated names, labels outside the task's set, and evaluation
                rows of unknown tasks.
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
            splits = splits_of(name, source)
            splits.update({split: as_dataset(name, d[name]) for split, d in given.items() if name in d})
            tasks.append(make_task(name, splits, None if row_format is None else RowFormat(row_format)))
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
        """Labels of classification tasks; `None` for other tasks, and where each row has several labels."""
        if self.row_format is not RowFormat.CLASSIFICATION or self.is_multi_label:
            return None
        return LabelSpace.from_label_names({name: task.label_names for name, task in self._tasks.items()})

    @property
    def labels_are_classes(self) -> bool:
        """Whether a row's answer is one class, of a text or of tokens, rather than tokens."""
        if self.row_format is RowFormat.TOKENIZED:
            return isinstance(next(iter(self._tasks.values())).splits["train"].features["labels"], Value)
        return self.row_format is RowFormat.CLASSIFICATION

    @property
    def is_multi_label(self) -> bool:
        """Whether each row has several labels, a list of zeros and ones (floats, for rows of tokens)."""
        first = next(iter(self.values()))
        if self.row_format is RowFormat.TOKENIZED:
            return is_float_list(first.splits["train"].features["labels"])
        return self.row_format is RowFormat.CLASSIFICATION and first.label_names is None

    @property
    def num_labels(self) -> int | None:
        """Number of labels of classification tasks."""
        if self.is_multi_label:
            row = next(iter(self.values())).splits["train"][0]
            return len(row["labels" if self.row_format is RowFormat.TOKENIZED else "label"])
        return None if self.label_space is None else len(self.label_space)

    def has_split(self, split: str) -> bool:
        return all(split in task.splits for task in self._tasks.values())

    def split(self, split: str) -> dict[str, Dataset]:
        """Rows of a split by task.

        Raises:
            `TaskError`: if a task does not have the split.
        """
        lacking = [name for name, task in self._tasks.items() if split not in task.splits]
        if lacking:
            remedy = "Pass them, or hold some out: tasks.with_validation()." if split == "validation" else "Pass them."
            raise TaskError(
                f"Expected {split!r} rows of every task, found none of {lacking}.",
                python=remedy,
                terminal=f"Add a file NAME/{split}.jsonl, or name {split} in the --config file's datasets.",
            )
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

    def with_validation(self, fraction: float = 0.1, seed: int = 0, max_rows: int | None = None) -> "TaskSet":
        """The same tasks, each with validation rows: where there are none, a share of the training rows is held out.

        Args:
            fraction (`float`, *optional*, defaults to 0.1):
                Share of a task's rows; at least 20 rows, at most 500 and never more than half of them.
            seed (`int`, *optional*, defaults to 0): seed of the draw, which does not depend on the rows' order.
            max_rows (`int`, *optional*): maximum number of rows that are held out of a task.

        Raises:
            `ConfigurationError`: for arguments out of range.
            `TaskError`: for a task with a single row.
        """
        check_number("fraction", fraction, 0, 1, above=True)
        check_at_least("seed", seed, 0)
        check_at_least("max_rows", max_rows, 1, optional=True)
        tasks = []
        for task in self._tasks.values():
            if "validation" not in task.splits:
                parts = hold_out(task.name, task.splits["train"], fraction, seed, max_rows)
                task = with_splits(task, dict(zip(("train", "validation"), parts)))
            tasks.append(task)
        return TaskSet(tasks, self.sampling_weights)

    def holding_out(self, name: str, count: int, seed: int = 0) -> "TaskSet":
        """The same tasks, with some training rows of one as its validation rows; drawn as in [`with_validation`]."""
        parts = draw_out(self[name].splits["train"], count, seed)
        changed = with_splits(self[name], dict(zip(("train", "validation"), parts)))
        return TaskSet([changed if own == name else task for own, task in self.items()], self.sampling_weights)

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
            kept.append(with_splits(task, {"train": task.splits["train"].select(rows)}) if dropped else task)
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
                    "is_streamed": task.is_streamed,
                }
                for name, task in self._tasks.items()
            },
        }


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
