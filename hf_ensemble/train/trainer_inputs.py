"""What the trainers over several tasks are given: datasets as tasks, and classifiers for their labels."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

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


def check_labels(model, label_space: LabelSpace | None) -> None:
    """Raise `ConfigurationError` when a classifier's head has another number of outputs than the tasks' labels."""
    if label_space is not None and model.config.num_labels != len(label_space):
        raise ConfigurationError(
            f"The tasks have {len(label_space)} different labels, the model's head has {model.config.num_labels} "
            f"outputs. Load the model with num_labels={len(label_space)}, in the order of TaskSet.label_space.names."
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
