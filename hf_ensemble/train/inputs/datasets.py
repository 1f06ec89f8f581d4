"""What the trainers over several tasks are given: datasets as tasks."""

from collections.abc import Collection, Mapping
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import TrainingArguments

from ...errors import ConfigurationError, TaskError
from ...logging import get_logger
from ...runs.systems import BASE, BASELINE
from ...tasks import TASK, RowFormat, TaskSet
from ...tasks.columns import column_names, renamed_class
from ...tasks.sft_rows import SFTRows
from ...tasks.task import as_dataset, named_splits

logger = get_logger(__name__)

# What a `DatasetDict` of the splits of one dataset is keyed by.
_SPLITS = {"train", "validation", "test", "eval", "dev", "valid"}
# Task names that would collide with names of metrics or of adapters.
_RESERVED = ("mean", "overall")


def is_one_dataset(train_dataset: Any) -> bool:
    """Whether a trainer is given a single dataset: a plain one, or a dict of one."""
    if isinstance(train_dataset, TaskSet):
        return False
    return not isinstance(train_dataset, Mapping) or len(train_dataset) == 1


def the_one_dataset(train_dataset: Any, eval_dataset: Any) -> tuple[Any, Any]:
    """Training and evaluation rows of a single dataset, as the parent trainer takes them.

    Raises:
        `TaskError`: for splits without training rows.
    """
    if isinstance(train_dataset, (list, tuple)) and train_dataset and not isinstance(train_dataset[0], Mapping):
        raise TaskError(
            f"Expected a dict of datasets by name, found a {type(train_dataset).__name__} of {len(train_dataset)} "
            f"{type(train_dataset[0]).__name__}s. Pass {{'NAME': dataset, ...}}."
        )
    if not isinstance(train_dataset, Mapping):
        return train_dataset, eval_dataset
    (rows,) = train_dataset.values()
    splits = {
        split: as_dataset(*train_dataset, own) if isinstance(own, list) else own
        for split, own in named_splits(rows).items()
    }
    if "train" not in splits:
        raise TaskError(f"Expected a split 'train' of the dataset {list(train_dataset)}, found {sorted(rows)}.")
    return splits["train"], splits.get("validation") if eval_dataset is None else eval_dataset


def is_text_classification(rows: Any) -> bool:
    """Whether rows are text with a class, which `transformers.Trainer` would not take."""
    found = column_names(rows) if isinstance(rows, Dataset | IterableDataset) else []
    columns = {renamed_class(found).get(column, column) for column in found}
    return columns >= set(RowFormat.CLASSIFICATION.required) and "input_ids" not in columns


def check_task_names(names: Collection[str]) -> None:
    """Refuse tasks whose metrics would have the names of others.

    Raises:
        `TaskError`: for names that a run uses itself, and for a name that is the base model's on another task.
    """
    reserved = sorted(name for name in names if name in _RESERVED or name.startswith(BASELINE))
    if reserved:
        raise TaskError(f"The task names {reserved} are used for metrics of the whole run: rename these tasks.")
    for name in (*names, "mean"):
        of_base = f"{BASE}_{name}"
        if of_base in names:
            where = "on average" if name == "mean" else f"on the task {name!r}"
            raise TaskError(
                f"Expected metrics of the task {of_base!r} under names of their own, found those of the base model "
                f"{where} (eval_{of_base}_loss): rename the task."
            )


def check_sft_rows(tasks: TaskSet, reads: SFTRows) -> None:
    """Raise `TaskError` for rows of any split that `SFTTrainer` could make no tokens of."""
    for name, task in tasks.items():
        for split, rows in task.splits.items():
            if task.row_format is RowFormat.SFT:
                reads.check(name, split, rows)
            else:
                reads.check_columns(name, split, rows.column_names)


def check_not_splits(train_dataset: Any) -> None:
    """Raise `TaskError` for a `DatasetDict` of one dataset's splits, which looks like a dict of datasets by name.

    A plain dict with the names of splits is warned of.
    """
    if not isinstance(train_dataset, Mapping) or isinstance(train_dataset, TaskSet):
        return
    if not (set(train_dataset) <= _SPLITS and len(train_dataset) > 1):
        return
    found = sorted(train_dataset)
    if isinstance(train_dataset, DatasetDict | IterableDatasetDict):
        raise TaskError(
            f"Expected a dict of datasets by name, found the splits {found} of one dataset. Pass "
            'train_dataset=dataset["train"], or {"name": dataset, ...} with several datasets.'
        )
    logger.warning(
        "The datasets are named %s, like the splits of one dataset, and are taken for different datasets. For one "
        'dataset pass train_dataset=dataset["train"].',
        found,
    )


def as_task_set(train_dataset: Any, eval_dataset: Any, row_format: RowFormat | None = None) -> TaskSet:
    """The trainers' datasets as tasks, which may lack evaluation rows.

    Raises:
        `TaskError`: for anything but named datasets.
    """
    if isinstance(train_dataset, TaskSet):
        if eval_dataset is not None:
            raise TaskError("A TaskSet brings its own evaluation rows: do not pass eval_dataset beside it.")
        return train_dataset
    if is_table_of_tasks(eval_dataset):
        eval_dataset = rows_by_task(eval_dataset)
    if eval_dataset is not None and not isinstance(eval_dataset, Mapping):
        raise TaskError(
            f"Expected evaluation rows by name, {list(train_dataset)}, found one {type(eval_dataset).__name__} without "
            f"a column {TASK!r}. Pass a dict, add the column, or leave eval_dataset out to hold out some rows of each "
            "dataset."
        )
    return TaskSet.from_datasets(train_dataset, eval_dataset, row_format=row_format)


def is_table_of_tasks(rows: Any) -> bool:
    """Whether rows of several datasets stand in one, and say in the column `task` which they belong to."""
    return isinstance(rows, Dataset) and TASK in rows.column_names


def rows_by_task(rows: Dataset) -> dict[str, Dataset]:
    """The rows of a table of several tasks by task, each in the order of the table."""
    tasks = rows.with_format(None)[TASK][:]
    return {name: rows.select([i for i, task in enumerate(tasks) if task == name]) for name in dict.fromkeys(tasks)}


def with_held_out_rows(tasks: TaskSet, fraction: float, seed: int, max_rows: int | None = None) -> TaskSet:
    """The tasks, with validation rows held out of those that have none, at most `max_rows` of each."""
    lacking = [name for name, task in tasks.items() if "validation" not in task.splits]
    if not lacking:
        return tasks
    tasks = tasks.with_validation(fraction, seed, max_rows)
    held_out = ", ".join(f"{name} ({len(tasks[name].splits['validation'])})" for name in lacking)
    logger.warning(
        "No evaluation rows were given: some training rows are held out, drawn with seed %d: %s.", seed, held_out
    )
    return tasks


def check_rows_and_arguments(tasks: TaskSet, args: TrainingArguments, streamed: Collection[str] = ()) -> None:
    """Raise `ConfigurationError` for arguments that trainings on some of the tasks could not honour.

    Args:
        tasks (`TaskSet`): the tasks.
        args (`TrainingArguments`): the trainer's arguments.
        streamed (`Collection[str]`, *optional*):
            Tasks that are streamed. Trainings of any others are streams too then, whose batches are all whole.
    """
    if streamed:
        # As `Trainer`, which warns that streams are read in their own order.
        return
    batch_size = args.train_batch_size * args.world_size
    rows = {name: len(own) for name, own in tasks.split("train").items()}
    small = [name for name, count in rows.items() if count < batch_size]
    if args.dataloader_drop_last and small:
        raise ConfigurationError(
            f"With dataloader_drop_last=True a training on {small[0]!r} alone would have no batch: expected at least "
            f"{batch_size} rows of each task, found {rows[small[0]]}. Set dataloader_drop_last=False, or a smaller "
            "per_device_train_batch_size."
        )


def check_left_rows(tasks: TaskSet, train_rows: Dataset, eval_rows: Mapping[str, Dataset]) -> None:
    """Warn of rows that have become no tokens, and raise `TaskError` for tasks that have no others.

    Args:
        tasks (`TaskSet`): the tasks.
        train_rows (`Dataset`): their training rows as tokens, with `task`.
        eval_rows (`dict[str, Dataset]`): their validation rows as tokens, by task.
    """
    lost = sorted(set(tasks.names) - set(train_rows.unique(TASK)))
    lost += [name for name, rows in eval_rows.items() if len(rows) == 0]
    if lost:
        raise TaskError(f"No row of the tasks {lost} is left after tokenization: raise max_length.")
    kept = {"train": len(train_rows), "validation": sum(map(len, eval_rows.values()))}
    for split, count in kept.items():
        total = sum(map(len, tasks.split(split).values()))
        if count < total:
            logger.warning(
                "%d of %d %s rows are left out: max_length cuts their answers off.", total - count, total, split
            )


def check_one_label_set(tasks: TaskSet) -> None:
    """Raise `ConfigurationError` for classification tasks whose labels differ, which no loss can be smoothed over."""
    if tasks.label_space is not None and not tasks.label_space.is_shared:
        found = {name: list(task.label_names) for name, task in tasks.items()}
        raise ConfigurationError(
            "label_smoothing_factor is for tasks of one label set, since it spreads each label over all of them; found "
            f"{found!s:.200}. Leave it out, or name the labels alike where they mean the same (integers without names "
            "are never the same labels)."
        )


def check_template(rows: Dataset, processing_class: Any) -> None:
    """Raise `TaskError` for what trl cannot make chats into tokens with.

    Those are a tokenizer without a chat template, and rows without `chat_template_kwargs` beside rows with them.
    """
    row = rows[0]
    is_chat = any(isinstance(row.get(column), list) for column in ("messages", "prompt"))
    if is_chat and getattr(processing_class, "chat_template", None) is None:
        raise TaskError(
            f"Task {row[TASK]!r}: expected a tokenizer with a chat template for rows of messages, found none. Set its "
            "chat_template, pass chat_template_path, or use an instruction-tuned model."
        )
    if "chat_template_kwargs" in rows.column_names and None in (given := rows["chat_template_kwargs"][:]):
        raise TaskError(
            f"Task {rows[given.index(None)][TASK]!r}: expected chat_template_kwargs in all rows of all tasks or in "
            "none, found rows with and without. Add them to every row."
        )
