"""The layers that an adapter is put on, where PEFT does not know them or the user has named others."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ...errors import ConfigurationError
from ...logging import get_logger

logger = get_logger(__name__)

# How names of classifiers' heads end, which PEFT trains whole beside the adapter.
_HEADS = ("classifier", "score", "qa_outputs")
# How PEFT begins the errors that are about the names of layers.
_PEFT_ERRORS = ("Please specify `target_modules`", "Target modules", "No modules were targeted")


def with_target_modules(peft_config: PeftConfig | None, model: nn.Module | str) -> PeftConfig | None:
    """The adapter's configuration; without target modules, on all linear layers where PEFT has no default.

    Args:
        peft_config (`PeftConfig`, *optional*): as the user has given it, which is not changed.
        model (`nn.Module` or `str`): the base model, or its name.

    Raises:
        `ConfigurationError`: for kinds of adapters other than LoRA, whose layers cannot be inferred.
    """
    if not hasattr(peft_config, "target_modules") or peft_config.target_modules is not None:
        return peft_config
    if getattr(peft_config, "target_parameters", None):
        return peft_config
    kind = _model_type(model)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(peft_config.peft_type)
    if kind is None or kind in (getattr(tuner, "target_module_mapping", None) or {}):
        return peft_config
    whole = tuple(getattr(peft_config, "modules_to_save", None) or ())
    names = [name for name in linear_layers(model) if not name.endswith(whole)]
    if type(peft_config) is not LoraConfig or not names:
        raise ConfigurationError(
            f"PEFT has no default target_modules for models of type {kind!r}.", **_advice(peft_config, names)
        )
    logger.warning(
        "PEFT has no default target_modules for models of type %r: the adapter is put on all linear layers, %s.",
        kind,
        names,
    )
    peft_config = copy.copy(peft_config)
    peft_config.target_modules = set(names)
    return peft_config


@contextmanager
def target_modules_named(peft_config: PeftConfig | None, model: nn.Module | str) -> Iterator[None]:
    """Raises what PEFT says of target modules that a model does not have as an error that names those that it has.

    Raises:
        `ConfigurationError`: in place of PEFT's `ValueError`.
    """
    try:
        yield
    except ValueError as error:
        if peft_config is None or not str(error).startswith(_PEFT_ERRORS):
            raise
        raise ConfigurationError(str(error), **_advice(peft_config, linear_layers(model))) from error


def linear_layers(model: nn.Module | str) -> list[str]:
    """Last names of a model's linear layers, without its output layer; none where a name cannot be resolved."""
    if isinstance(model, str):
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
        except (OSError, ValueError, ImportError):
            return []  # Loading the model says what is wrong.
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    found = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not embeddings
    }
    return sorted(name for name in found if not name.endswith(_HEADS))


def _model_type(model: nn.Module | str) -> str | None:
    if isinstance(model, str):
        try:
            return AutoConfig.from_pretrained(model).model_type
        except (OSError, ValueError):
            return None
    return getattr(getattr(model, "config", None), "model_type", None)


def _advice(peft_config: PeftConfig, names: list[str]) -> dict[str, str]:
    """What to do, in Python and in a terminal."""
    among = f" to some of the model's linear layers, {names}, or" if names else ""
    argument: Any = type(peft_config).__name__
    return {
        "python": f"Set {argument}(target_modules=...){among} to 'all-linear'.",
        "terminal": f"Set --lora_target_modules{among} to 'all-linear'.",
    }
