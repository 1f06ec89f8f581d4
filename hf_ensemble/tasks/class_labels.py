"""Labels of classification tasks: numbers, names, booleans, or several for each row."""

from collections.abc import Mapping, Sequence

from datasets import ClassLabel, Dataset, List, Value

from ..errors import TaskError
from ..logging import get_logger

logger = get_logger(__name__)

# More classes than any label set has: a larger number is a mistake, and a head is as large as its largest label.
_MAX_LABELS = 2**16
# The label of rows whose label nobody tells, in the test splits of public datasets.
HIDDEN = -1


def numbered_labels(
    task: str, splits: Mapping[str, Dataset], names: Sequence[str] | None = None
) -> tuple[dict[str, Dataset], tuple[str, ...] | None]:
    """A classification task with its labels as numbers, and the names of its labels.

    Labels that are texts are numbered in the order of the names, which is that of the alphabet unless given.

    Args:
        task (`str`): the task's name.
        splits (`dict[str, Dataset]`): its splits, `"train"` among them.
        names (`Sequence[str]`, *optional*): names of its labels, where they are known already.

    Returns:
        `tuple[dict[str, Dataset], tuple[str, ...] | None]`: the splits, and the names; `None` where each row has
        several labels, as a list of zeros and ones.

    Raises:
        `TaskError`: for labels that are not integers from 0, and labels that the training split does not have.
    """
    if is_multi_label(splits["train"]):
        for split, rows in splits.items():
            _check_multi_labels(task, split, rows, len(splits["train"].with_format(None)[0]["label"]))
        return dict(splits), None
    train = splits["train"]
    if names is None and isinstance(train.features["label"], ClassLabel):
        names = train.features["label"].names
    if names is None and _has_texts(train):
        found = set(train.with_format(None)["label"][:])
        _check_present(task, "train", train)
        names = sorted(found)
    if names is None and any(_has_texts(rows) for rows in splits.values()):
        _check_label_type(task, "train", train)
        names = label_names_of(task, {"train": train})
    splits = {
        split: _by_number(task, split, rows, names) if _has_texts(rows) else rows for split, rows in splits.items()
    }
    return splits, label_names_of(task, splits, names)


def are_hidden(rows: Dataset) -> bool:
    """Whether no row has a label that is told."""
    return "label" in rows.features and set(rows.with_format(None)["label"]) == {HIDDEN}


def is_multi_label(rows: Dataset) -> bool:
    """Whether each row has a list of labels."""
    return isinstance(rows.features["label"], List)


def is_float_list(feature: object) -> bool:
    """Whether a column holds lists of floats."""
    return (
        isinstance(feature, List) and isinstance(feature.feature, Value) and feature.feature.dtype.startswith("float")
    )


def _check_multi_labels(task: str, split: str, rows: Dataset, size: int) -> None:
    for number, label in enumerate(rows.with_format(None)["label"]):
        if not isinstance(label, list) or len(label) != size or not all(value in (0, 1) for value in label):
            raise TaskError(
                f"Task {task!r}, split {split!r}, row {number} (counted from 0): labels have to be lists of {size} "
                f"zeros and ones, one for each label, as in the first training row; found {label!r:.60}. Correct the "
                "row or drop it."
            )


def _has_texts(rows: Dataset) -> bool:
    feature = rows.features["label"]
    return isinstance(feature, Value) and "string" in feature.dtype


def _by_number(task: str, split: str, rows: Dataset, names: Sequence[str]) -> Dataset:
    _check_present(task, split, rows)
    numbers = {name: number for number, name in enumerate(names)}
    found = rows.with_format(None)["label"][:]
    unknown = next((label for label in found if label not in numbers), None)
    if unknown is not None:
        raise TaskError(
            f"Task {task!r}, split {split!r}: label {unknown!r} is outside the task's set of {len(names)} labels "
            f"{list(names)!s:.200}, which the training split defines. Drop these rows."
        )
    return rows.remove_columns("label").add_column("label", [numbers[label] for label in found])


def label_names_of(task: str, splits: Mapping[str, Dataset], names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of a classification task's labels, in the order of the labels.

    Unless given, names come from the `ClassLabel` feature or from `label_text`, and are `TASK:0`, `TASK:1`, ...
    otherwise. Rows of a test split may have hidden labels, -1.

    Raises:
        `TaskError`: for labels that are not integers from 0, and labels that the training split does not have.
    """
    for split, dataset in splits.items():
        _check_label_type(task, split, dataset)
    feature = splits["train"].features["label"]
    if names is not None:
        names = tuple(names)
    elif isinstance(feature, ClassLabel):
        names = tuple(feature.names)
    else:
        found = splits["train"].unique("label")
        if min(found) < 0 or max(found) >= _MAX_LABELS:
            hidden = "Rows whose labels are hidden can only be test rows."
            raise TaskError(
                f"Task {task!r}: labels have to be integers from 0 to the number of classes less 1, at most "
                f"{_MAX_LABELS - 1}, found {min(found) if min(found) < 0 else max(found)}.",
                python=f"Drop these rows, or cast the column to datasets.ClassLabel. {hidden}",
                terminal=f"Drop these rows, or write labels as texts. {hidden}",
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
        has_names = isinstance(own, ClassLabel) and tuple(own.names) != names
        # Numbers without names of their own may be named by `label_text`, or not at all.
        if has_names and (isinstance(feature, ClassLabel) or set(own.names) == set(names)):
            raise TaskError(
                f"Task {task!r}, split {split!r}: expected the labels of the training rows in their order, "
                f"{list(names)}, found {own.names}. Cast the column to the training rows' ClassLabel."
            )
        allowed = [HIDDEN] if split == "test" else []
        outside = [label for label in dataset.unique("label") if not 0 <= label < len(names) and label not in allowed]
        if outside:
            hidden = " Labels are hidden in test sets alone: leave these rows out to hold some training rows out."
            raise TaskError(
                f"Task {task!r}, split {split!r}: label {min(outside)} is outside the task's set of {len(names)} "
                f"labels {list(names)!s:.200}, which the training split defines. Drop these rows."
                f"{hidden if HIDDEN in outside else ''}"
            )
    return names


def _check_label_type(task: str, split: str, dataset: Dataset) -> None:
    feature = dataset.features["label"]
    plain = dataset.with_format(None)
    is_integer = isinstance(feature, Value) and (feature.dtype == "bool" or "int" in feature.dtype)
    if not isinstance(feature, ClassLabel) and not is_integer:
        raise TaskError(
            f"Task {task!r}, split {split!r}: labels have to be integers from 0, one for each row, found "
            f"{plain[0]['label']!r:.60}.",
            python="Cast the column to datasets.ClassLabel.",
            terminal="Write labels as texts or as integers.",
        )
    _check_present(task, split, dataset)


def _check_present(task: str, split: str, dataset: Dataset) -> None:
    labels = dataset.with_format(None)["label"][:]
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
