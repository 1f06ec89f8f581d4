"""Models for rows of text and their tokenizers: the head of a classifier, and the adapter that goes with it."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import number_of_arguments

from ...errors import ConfigurationError
from ...logging import get_logger
from ...models import LabelSimilarityForSequenceClassification
from ...models.inputs import is_encoder_decoder
from ...models.kinds import ModelKind, check_answers_of, check_outputs, kind_of
from ...models.label_similarity import LabelHead
from ...tasks import LabelSpace, TaskSet

logger = get_logger(__name__)

_MULTI_LABEL = "multi_label_classification"
_CLASSIFIER = "ForSequenceClassification"
# What `from_pretrained` of a tokenizer takes of the model's.
_OF_TOKENIZERS = ("revision", "trust_remote_code")


def tokenizer_kwargs(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a model's `from_pretrained` that its tokenizer takes as well."""
    return {key: model_kwargs[key] for key in _OF_TOKENIZERS if model_kwargs.get(key) is not None}


def made_model(model_init: Callable[..., nn.Module]) -> nn.Module:
    """The model that a function makes, called as `Trainer` calls it: with no trial, where it takes one.

    Raises:
        `ConfigurationError`: for a function of several arguments.
    """
    count = number_of_arguments(model_init)
    if count > 1:
        raise ConfigurationError(
            f"Expected model_init to take no argument or the trial of a hyperparameter search, found {count} arguments."
        )
    return model_init(None) if count else model_init()


def tokenizer_of(model: Any, model_kwargs: dict[str, Any], is_needed: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model that is named, or was loaded by its name.

    Args:
        model (`str` or `nn.Module`): the model.
        model_kwargs (`dict`): keyword arguments of its `from_pretrained`.
        is_needed (`bool`): whether rows become tokens, or are padded, with it. Otherwise it is saved beside the model
            where there is one.

    Raises:
        `ConfigurationError`: for a model without a name, where a tokenizer is needed.
    """
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name and is_needed:
        raise ConfigurationError(
            "Expected a tokenizer, which makes tokens of the rows or pads them; found none, and the model was not "
            "loaded by a name. Pass processing_class, or rows of tokens with a data_collator."
        )
    try:
        return AutoTokenizer.from_pretrained(name, **tokenizer_kwargs(model_kwargs)) if name else None
    except (OSError, ValueError) as error:
        if is_needed:
            raise
        logger.info("There is no tokenizer of %r, and none is needed for rows of tokens: %s", name, error)
        return None


def load_model(
    name: str, tasks: TaskSet, tokenizer: PreTrainedTokenizerBase, head: str, model_kwargs: dict[str, Any]
) -> nn.Module:
    """A language model, an encoder-decoder where the name is one's, or a classifier for the tasks' labels.

    Args:
        name (`str`): Hub id or folder.
        tasks (`TaskSet`): the tasks.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        head (`str`): what classifies, see [`ClassifierArguments`].
        model_kwargs (`dict`): passed to `from_pretrained`.
    """
    if tasks.label_space is not None:
        return _load_classifier(name, tasks, tokenizer, head, model_kwargs)
    if tasks.is_multi_label:
        return AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=tasks.num_labels, problem_type=_MULTI_LABEL, **model_kwargs
        )
    config = AutoConfig.from_pretrained(name, **tokenizer_kwargs(model_kwargs))
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(name, **model_kwargs)


def _load_classifier(
    name: str, tasks: TaskSet, tokenizer: PreTrainedTokenizerBase, head: str, model_kwargs: dict[str, Any]
) -> nn.Module:
    labels = tasks.label_space.names
    # As trl loads language models.
    model_kwargs = {"dtype": torch.float32, **model_kwargs}
    if head == "auto":
        head = _best_head(name, tasks, tokenizer, model_kwargs)
    if head == "label_similarity":
        alike = _tasks_of_labels_alike(tokenizer, tasks.label_space)
        if len(alike) == len(tasks):
            raise ConfigurationError(
                f"Labels of every task are the same tokens to this tokenizer, {alike[0]!r} among them, so no text is "
                "more similar to one of them. Name the labels by words that it knows, or set head='linear'."
            )
        if alike:
            logger.warning(
                "Labels of %s are the same tokens to this tokenizer, so no text is more similar to one of them. Name "
                "them by words that it knows, or set head='linear'.",
                alike,
            )
        return LabelSimilarityForSequenceClassification.from_encoder(name, tokenizer, labels, **model_kwargs)
    model = AutoModelForSequenceClassification.from_pretrained(
        name,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        **model_kwargs,
    )
    warn_of_random_head(model)
    return model


def _tasks_of_labels_alike(tokenizer: PreTrainedTokenizerBase, label_space: LabelSpace) -> list[str]:
    """Tasks of which two labels' texts become the same tokens."""
    tokens = [tuple(own) for own in LabelHead.of(tokenizer, label_space.names).token_ids]
    return [
        task
        for task, outputs in label_space.task_labels.items()
        if len({tokens[output] for output in outputs}) < len(outputs)
    ]


def _best_head(name: str, tasks: TaskSet, tokenizer: PreTrainedTokenizerBase, model_kwargs: dict[str, Any]) -> str:
    """The checkpoint's own head where it was trained for as many labels, else the labels' texts where they have any."""
    labels = tasks.label_space.names
    config = AutoConfig.from_pretrained(name, **tokenizer_kwargs(model_kwargs))
    if _has_head(config) and config.num_labels == len(labels):
        return "linear"
    unnamed = [task for task, own in tasks.items() if f"{task}:0" in own.label_names]
    if unnamed:
        logger.warning(
            "The labels of %s are numbers without names, so texts cannot be compared with them. Name them for "
            "head='label_similarity': labels as text, a column 'label_text', or datasets.ClassLabel.",
            unnamed,
        )
        return "linear"
    if len(_tasks_of_labels_alike(tokenizer, tasks.label_space)) == len(tasks):
        logger.warning(
            "Labels of every task are the same tokens to this tokenizer, so texts cannot be compared with them. Name "
            "the labels by words that it knows for head='label_similarity'."
        )
        return "linear"
    return "label_similarity"


def _has_head(config: Any) -> bool:
    return any(name.endswith(_CLASSIFIER) for name in getattr(config, "architectures", None) or ())


def warn_of_random_head(model: nn.Module) -> None:
    """Warn of a classifier whose checkpoint had no head, so that its head is a new one at random."""
    config = getattr(model, "config", None)
    is_from_checkpoint = bool(getattr(config, "architectures", None))
    if type(model).__name__.endswith(_CLASSIFIER) and is_from_checkpoint and not _has_head(config):
        logger.warning(
            "The head of this %s is new and random: gradients at its start say little of which datasets help, and it "
            "needs long training. Pass the model by name with head='label_similarity', which compares texts with the "
            "labels' texts.",
            type(model).__name__,
        )


def adapter_for_head(peft_config: PeftConfig, model: nn.Module) -> PeftConfig:
    """The adapter's configuration with the task type that the model's head needs.

    A linear head is trained beside the adapter (`SEQ_CLS`); the labels' texts are no parameters, so nothing is.

    Args:
        peft_config (`PeftConfig`): as the user has given it, which is not changed.
        model (`nn.Module`): the base model.

    Raises:
        `ConfigurationError`: for a task type other than that of classifiers.
    """
    is_similarity = isinstance(model, LabelSimilarityForSequenceClassification)
    if not (is_similarity or type(model).__name__.endswith(_CLASSIFIER)):
        return peft_config
    if peft_config.task_type not in (None, "SEQ_CLS"):
        raise ConfigurationError(
            f"Expected {type(peft_config).__name__}(task_type='SEQ_CLS') for text with labels, found "
            f"{str(getattr(peft_config.task_type, 'value', peft_config.task_type))!r}. Leave task_type out."
        )
    peft_config = copy.copy(peft_config)
    peft_config.task_type = None if is_similarity else "SEQ_CLS"
    return peft_config


def with_task_type(peft_config: PeftConfig | None, model: nn.Module | str) -> PeftConfig | None:
    """The adapter's configuration; of a language model with its task type, by which saved adapters are loaded.

    Args:
        peft_config (`PeftConfig`, *optional*): as the user has given it, which is not changed.
        model (`nn.Module` or `str`): the base model, or the name of one of decoder layers.
    """
    is_name = isinstance(model, str)
    if peft_config is None or peft_config.task_type is not None:
        return peft_config
    if not is_name and kind_of(model) is not ModelKind.LANGUAGE_MODEL:
        return peft_config
    peft_config = copy.copy(peft_config)
    peft_config.task_type = "SEQ_2_SEQ_LM" if not is_name and is_encoder_decoder(model) else "CAUSAL_LM"
    return peft_config


def check_labels(model: Any, tasks: TaskSet) -> None:
    """Raise `ConfigurationError` for a model without answers of the rows' kind, or with a head for other labels."""
    check_answers_of(model, tasks)
    config = getattr(model, "config", None)
    if config is None:
        return  # A module of the user's own, which says nothing of its outputs.
    label_space = tasks.label_space
    if tasks.is_multi_label:
        found = (config.num_labels, config.problem_type)
        if found not in ((tasks.num_labels, _MULTI_LABEL), (tasks.num_labels, None)):
            raise ConfigurationError(
                f"The tasks' rows have {tasks.num_labels} labels each, which need a head of as many outputs and "
                f"problem_type={_MULTI_LABEL!r}; found {found[0]} outputs and problem_type={found[1]!r}. Load the "
                f"model with num_labels={tasks.num_labels} and that problem_type."
            )
    check_outputs(model, label_space)
