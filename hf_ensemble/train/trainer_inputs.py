"""What the trainers over several tasks are given: datasets as tasks, and classifiers for their labels."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from ..errors import ConfigurationError, TaskError
from ..tasks import TASK, LabelSpace, TaskSet


def as_task_set(train_dataset: Any, eval_dataset: Any) -> TaskSet:
    """The trainers' datasets as tasks.

    Raises:
        `TaskError`: for anything but named datasets.
    """
    if isinstance(train_dataset, TaskSet):
        if eval_dataset is not None:
            raise TaskError("A TaskSet brings its own evaluation rows: do not pass eval_dataset beside it.")
        return train_dataset
    for name, value in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
        if not isinstance(value, Mapping) and not (name == "eval_dataset" and value is None):
            raise TaskError(f"Expected {name} to be a dict of named datasets, found {type(value).__name__}.")
    return TaskSet.from_datasets(train_dataset, eval_dataset)


def check_labels(model, label_space: LabelSpace | None) -> None:
    """Raise `ConfigurationError` when a classifier's head has another number of outputs than the tasks' labels."""
    if label_space is not None and model.config.num_labels != len(label_space):
        raise ConfigurationError(
            f"The tasks have {len(label_space)} different labels, the model's head has {model.config.num_labels} "
            f"outputs. Load the model with num_labels={len(label_space)}, in the order of TaskSet.label_space.names."
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


def load_classifier(name: str, label_space: LabelSpace, **kwargs: Any):
    """A sequence classifier whose outputs are the label space's; `kwargs` go to `from_pretrained`."""
    return AutoModelForSequenceClassification.from_pretrained(
        name,
        num_labels=len(label_space),
        id2label=dict(enumerate(label_space.names)),
        label2id={label: i for i, label in enumerate(label_space.names)},
        **kwargs,
    )
