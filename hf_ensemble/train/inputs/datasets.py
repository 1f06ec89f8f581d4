"""What the trainers over several tasks are given: datasets as tasks, and classifiers for their labels."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    TrainingArguments,
)

from ...errors import ConfigurationError, TaskError
from ...logging import get_logger
from ...tasks import TASK, LabelSpace, RowFormat, TaskSet
from ...tasks.task import as_dataset, splits_of

logger = get_logger(__name__)

# What a `DatasetDict` of the splits of one dataset is keyed by.
_SPLITS = {"train", "validation", "test", "eval", "dev", "valid"}


def is_one_dataset(train_dataset: Any) -> bool:
    """Whether a trainer is given a single dataset: a plain one, or a dict of one."""
    if isinstance(train_dataset, TaskSet):
        return False
    return not isinstance(train_dataset, Mapping) or len(train_dataset) == 1


def the_one_dataset(train_dataset: Any, eval_dataset: Any) -> tuple[Any, Any]:
    """Training and evaluation rows of a single dataset, as the parent trainer takes them."""
    if not isinstance(train_dataset, Mapping):
        return train_dataset, eval_dataset
    (rows,) = train_dataset.values()
    if isinstance(rows, list):
        rows = as_dataset(*train_dataset, rows)
    if isinstance(rows, Mapping):
        splits = splits_of(*train_dataset, rows)
        return splits["train"], splits.get("validation") if eval_dataset is None else eval_dataset
    return rows, eval_dataset


def is_text_classification(rows: Any) -> bool:
    """Whether rows are text with a label, which `transformers.Trainer` would not take."""
    columns = set(getattr(rows, "column_names", None) or ())
    return columns >= set(RowFormat.CLASSIFICATION.required) and "input_ids" not in columns


def as_task_set(train_dataset: Any, eval_dataset: Any, row_format: RowFormat | None = None) -> TaskSet:
    """The trainers' datasets as tasks, which may lack evaluation rows.

    Raises:
        `TaskError`: for anything but named datasets.
    """
    if isinstance(train_dataset, TaskSet):
        if eval_dataset is not None:
            raise TaskError("A TaskSet brings its own evaluation rows: do not pass eval_dataset beside it.")
        return train_dataset
    if isinstance(train_dataset, DatasetDict) and set(train_dataset) <= _SPLITS:
        raise TaskError(
            f"Expected a dict of datasets by name, found the splits {sorted(train_dataset)} of one dataset. Pass "
            'train_dataset=dataset["train"], or {"name": dataset, ...} with several datasets.'
        )
    if eval_dataset is not None and not isinstance(eval_dataset, Mapping):
        raise TaskError(
            f"Expected evaluation rows by name, {list(train_dataset)}, found one {type(eval_dataset).__name__}. Pass a "
            "dict, or leave eval_dataset out to hold out some rows of each dataset."
        )
    return TaskSet.from_datasets(train_dataset, eval_dataset, row_format=row_format)


def with_held_out_rows(tasks: TaskSet, fraction: float, seed: int) -> TaskSet:
    """The tasks, with validation rows held out of those that have none."""
    lacking = [name for name, task in tasks.items() if "validation" not in task.splits]
    if not lacking:
        return tasks
    tasks = tasks.with_validation(fraction, seed)
    held_out = ", ".join(f"{name} ({len(tasks[name].splits['validation'])})" for name in lacking)
    logger.warning(
        "No evaluation rows were given: some training rows are held out, drawn with seed %d: %s.", seed, held_out
    )
    return tasks


def check_rows_and_arguments(tasks: TaskSet, args: TrainingArguments) -> None:
    """Raise `ConfigurationError` for arguments that trainings on some of the tasks could not honour."""
    if len(set(tasks.sampling_weights.values())) > 1 and args.train_sampling_strategy != "random":
        raise ConfigurationError(
            "Sampling weights draw rows at random, expected train_sampling_strategy='random', found "
            f"{args.train_sampling_strategy!r}. Leave one of them out."
        )
    batch_size = args.train_batch_size * args.world_size
    rows = {name: len(own) for name, own in tasks.split("train").items()}
    small = [name for name, count in rows.items() if count < batch_size]
    if args.dataloader_drop_last and small:
        raise ConfigurationError(
            f"With dataloader_drop_last=True a training on {small[0]!r} alone would have no batch: expected at least "
            f"{batch_size} rows of each task, found {rows[small[0]]}. Set dataloader_drop_last=False, or a smaller "
            "per_device_train_batch_size."
        )


def check_labels(model, label_space: LabelSpace | None) -> None:
    """Raise `ConfigurationError` when a classifier's head has another number of outputs than the tasks' labels."""
    if label_space is not None and model.config.num_labels != len(label_space):
        raise ConfigurationError(
            f"The tasks have {len(label_space)} different labels, the model's head has {model.config.num_labels} "
            f"outputs. Load the model with num_labels={len(label_space)}, in the order of TaskSet.label_space.names."
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


def load_model(name: str, label_space: LabelSpace | None):
    """A language model, an encoder-decoder where the name is one's, or a classifier for the label space."""
    if label_space is not None:
        return load_classifier(name, label_space)
    auto = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(name).is_encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(name)


def load_classifier(name: str, label_space: LabelSpace, **kwargs: Any):
    """A sequence classifier whose outputs are the label space's; `kwargs` go to `from_pretrained`."""
    return AutoModelForSequenceClassification.from_pretrained(
        name,
        num_labels=len(label_space),
        id2label=dict(enumerate(label_space.names)),
        label2id={label: i for i, label in enumerate(label_space.names)},
        **kwargs,
    )
