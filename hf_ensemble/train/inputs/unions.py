"""Rows of several datasets that one model is trained on, as its parent would take them."""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from datasets import Dataset, IterableDataset
from transformers import TrainingArguments
from trl import SFTConfig

from ...errors import ConfigurationError, TaskError
from ...logging import get_logger
from ...tasks import META_COLUMNS, TaskSet
from ...tasks.columns import column_names
from ...tasks.row_checks import image_columns
from ...tasks.task import named_splits

logger = get_logger(__name__)

Rows = TypeVar("Rows", Dataset, IterableDataset)


def skips_preparation(args: TrainingArguments) -> bool:
    """Whether rows are taken as they are."""
    return bool((getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"))


def is_left_to_parent(rows: Any, data_collator: Any, args: TrainingArguments | None) -> bool:
    """Whether the rows of one dataset are read by a transform, or by a collator, of the user's own."""
    return has_transform(rows) or (data_collator is not None and not getattr(args, "remove_unused_columns", True))


def has_transform(rows: Any) -> bool:
    """Whether rows are what a function makes of them each time that they are read."""
    return isinstance(rows, Dataset) and rows.format["type"] == "custom"


def uncut(args: SFTConfig) -> SFTConfig:
    """The arguments with which trl makes tokens of rows, and neither cuts nor shuffles them."""
    args = copy.copy(args)
    args.max_length, args.shuffle_dataset = None, False
    return args


def check_transforms(train_dataset: Any, args: TrainingArguments) -> None:
    """Raise `ConfigurationError` for datasets with a transform of their own, which trl does not prepare either."""
    if not isinstance(train_dataset, Mapping):
        return
    found = [name for name, rows in train_dataset.items() if has_transform(named_splits(rows).get("train"))]
    if found and not skips_preparation(args):
        skipping = (
            "Pass dataset_kwargs={'skip_prepare_dataset': True} with a transform that returns trainer-ready rows of "
            "tokens, or apply it with Dataset.map()."
        )
        raise ConfigurationError(
            f"Tasks {found}: expected rows as they are stored, found a transform of Dataset.with_transform(), which "
            "preparing them would apply once and not in every epoch. "
            f"{skipping if isinstance(args, SFTConfig) else 'Apply it with Dataset.map().'}"
        )
    if found:
        logger.warning("The transforms of the tasks %s are applied once, before the training.", found)


def has_images(tasks: TaskSet) -> bool:
    """Whether trl would read images from the rows of some task.

    Raises:
        `TaskError`: when the tasks have different columns, as their rows are put into one table then.
    """
    columns = {name: set(task.splits["train"].column_names) - set(META_COLUMNS) for name, task in tasks.items()}
    if not any(image_columns(own) for own in columns.values()):
        return False
    (first, expected), *others = columns.items()
    for name, own in others:
        if own != expected:
            raise TaskError(
                f"Rows with images are put into one table: expected the same columns in all datasets, found "
                f"{sorted(expected)} in {first!r} and {sorted(own)} in {name!r}. Rename or remove columns, and give "
                "rows without images an empty list."
            )
    return True


def with_labels(name: str, rows: Rows, reads_masks: bool) -> Rows:
    """Rows of tokens with labels: every token counts where they have none.

    Args:
        name (`str`): the task's name, for errors.
        rows (`Dataset` or `IterableDataset`): rows that trl does not prepare.
        reads_masks (`bool`): whether masks are for a collator of the user's own; trl's does not read them.

    Raises:
        `TaskError`: for rows with a mask and no labels, which would be trained on as a whole.
    """
    columns = column_names(rows)
    if "labels" in columns or "input_ids" not in columns:
        return rows
    masks = [column for column in ("completion_mask", "assistant_masks") if column in columns]
    if masks and reads_masks:
        return rows
    if masks:
        raise TaskError(
            f"Task {name!r}: expected labels, as skip_prepare_dataset=True leaves masks unread, found the columns "
            f"{columns}. Add a 'labels' column (-100 for tokens that do not count), or leave skip_prepare_dataset out."
        )
    if isinstance(rows, IterableDataset):
        return rows.map(_labelled)
    return rows.add_column("labels", rows["input_ids"][:])


def _labelled(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"labels": row["input_ids"]}
