"""What a trainer makes of its arguments before it has a model and a tokenizer."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer_utils import number_of_arguments

from ...errors import ConfigurationError
from ...logging import get_logger
from .classifiers import tokenizer_kwargs

logger = get_logger(__name__)


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
