"""Kinds of models: whose scores and losses are of the labels that the model is trained on."""

import re
from enum import StrEnum

from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..errors import ConfigurationError
from ..tasks import LabelSpace, RowFormat, TaskSet
from .inputs import is_encoder_decoder
from .wrappers import unwrapped


class ModelKind(StrEnum):
    """What a model answers with, by the end of its class's name."""

    # One label at each token or choice: neither the next token's nor one of the row. Some names end like others.
    OTHER = (
        "WithLMHeadModel|XLNetLMHeadModel|ForMaskedLM|ForTokenClassification|ForQuestionAnswering(Simple)?|"
        "ForMultipleChoice|ForNextSentencePrediction|ForPreTraining"
    )
    CLASSIFIER = "ForSequenceClassification"
    LANGUAGE_MODEL = "ForCausalLM|LMHeadModel|ModelWithLMHead|ForConditionalGeneration"


def kind_of(model: nn.Module) -> ModelKind | None:
    """The kind of a model, or of the nearest class that it is derived from; `None` for one of the user's own."""
    kinds = (kind_of_name(own.__name__) for own in type(_base(model)).__mro__)
    return next((kind for kind in kinds if kind is not None), None)


def kind_of_name(class_name: str) -> ModelKind | None:
    """The kind of a class of models by its name."""
    return next((kind for kind in ModelKind if re.search(f"({kind})$", class_name)), None)


def check_kind(model: nn.Module | str) -> None:
    """Check that a model's labels are those whose scores and gradients are taken.

    Args:
        model (`nn.Module` or `str`): a model, or the name of its class.

    Raises:
        `ConfigurationError`: for a model with one label at each token or choice.
    """
    name = model if isinstance(model, str) else type(_base(model)).__name__
    kind = kind_of_name(model) if isinstance(model, str) else kind_of(model)
    if kind is ModelKind.OTHER:
        raise ConfigurationError(
            "Expected a causal language model, an encoder-decoder or a sequence classifier, whose labels are the next "
            f"tokens, its decoder's tokens or one class of each row; found {name}. Load the model with "
            "AutoModelForCausalLM, AutoModelForSeq2SeqLM or AutoModelForSequenceClassification, or train it with "
            "transformers.Trainer alone."
        )


def check_answers_of(model: nn.Module, tasks: TaskSet) -> None:
    """Raise `ConfigurationError` for a classifier of rows without a class, and a language model of rows with one."""
    kind, name = kind_of(model), type(_base(model)).__name__
    are_classes = tasks.labels_are_classes or tasks.is_multi_label
    if kind is ModelKind.CLASSIFIER and not are_classes:
        is_tokens = tasks.row_format is RowFormat.TOKENIZED
        remedy = "Give each row one integer in 'labels'" if is_tokens else "Give each row a text and a 'label'"
        raise ConfigurationError(
            f"Expected rows with one class each for a {name}, found rows whose answers are tokens "
            f"({tasks.row_format.value}). {remedy}, or load the model with AutoModelForCausalLM."
        )
    if kind is ModelKind.LANGUAGE_MODEL and are_classes:
        raise ConfigurationError(
            f"Expected a sequence classifier for rows with one class each ({tasks.row_format.value}), found a {name}. "
            "Load the model with AutoModelForSequenceClassification, or make prompts and completions of the rows."
        )


def check_outputs(model: nn.Module, label_space: LabelSpace | None) -> None:
    """Raise `ConfigurationError` for a classifier's head whose outputs are not the tasks' labels.

    Args:
        model (`nn.Module`): the classifier; one without a config says nothing of its outputs.
        label_space (`LabelSpace`, *optional*): of the tasks; `None` where rows have no classes.
    """
    config = getattr(model, "config", None)
    if label_space is None or config is None:
        return
    if config.num_labels != len(label_space):
        raise ConfigurationError(
            f"The tasks have {len(label_space)} different labels, the model's head has {config.num_labels} "
            f"outputs. Load the model with num_labels={len(label_space)}, in the order of TaskSet.label_space.names; "
            "where tasks have the same labels, name them alike in the column label_text."
        )
    names = [str(config.id2label.get(number)) for number in range(config.num_labels)]
    if names != list(label_space.names) and sorted(names) == sorted(label_space.names):
        raise ConfigurationError(
            f"The outputs of the model's head are called {names}, and the tasks' labels are in another order: "
            f"{list(label_space.names)}. Load the model with id2label in the order of TaskSet.label_space.names."
        )


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model's own loss is of label t + 1 at position t.

    `Trainer` goes by `loss_type` alone, which is `None` for classes such as `GPT2LMHeadModel`.
    """
    base = _base(model)
    is_causal = LOSS_MAPPING.get(getattr(base, "loss_type", None)) is ForCausalLMLoss
    return (is_causal or kind_of(base) is ModelKind.LANGUAGE_MODEL) and not is_encoder_decoder(base)


def _base(model: nn.Module) -> nn.Module:
    model = unwrapped(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model
