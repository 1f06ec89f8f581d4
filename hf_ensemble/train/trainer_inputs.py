"""What the trainers over several tasks are given: datasets as tasks, and classifiers for their labels."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForSequenceClassification, TrainingArguments

from ..errors import ConfigurationError, TaskError
from ..tasks import LabelSpace, TaskSet


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


def load_classifier(name: str, label_space: LabelSpace, **kwargs: Any):
    """A sequence classifier whose outputs are the label space's; `kwargs` go to `from_pretrained`."""
    return AutoModelForSequenceClassification.from_pretrained(
        name,
        num_labels=len(label_space),
        id2label=dict(enumerate(label_space.names)),
        label2id={label: i for i, label in enumerate(label_space.names)},
        **kwargs,
    )
