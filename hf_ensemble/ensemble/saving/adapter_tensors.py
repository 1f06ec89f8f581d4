"""Checking the tensors of an adapter's file against the base model's modules."""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...errors import EnsembleLoadError
from ..adapter_kinds import LAYER_TENSORS

PREFIX = "base_model.model."
_PARTS = tuple(part for parts in LAYER_TENSORS.values() for part in parts)
# Those whose shapes are known from the base alone; PEFT checks the others' when it loads them.
_SHAPED = (*LAYER_TENSORS["LORA"], *LAYER_TENSORS["IA3"])


def split_key(key: str) -> tuple[str, str]:
    """Module in the base model, and which part of its adapter the tensor is; empty for other tensors."""
    path = key.removeprefix(PREFIX)
    for part in _PARTS:
        if path.endswith(f".{part}"):
            return path.removesuffix(f".{part}"), part
    return path, ""


def check_tensor(
    base: nn.Module, key: str, shape: tuple[int, ...], saved: tuple[str, ...], what: str
) -> torch.Tensor | None:
    """Check a tensor's place and shape.

    Args:
        base (`nn.Module`): the base model, with or without adapters.
        key (`str`): the tensor's name.
        shape (`tuple[int, ...]`): its shape.
        saved (`tuple[str, ...]`): names of the modules that the adapter replaces, see [`replaced_modules`].
        what (`str`): adapter and file, for messages.

    Returns:
        `torch.Tensor`, *optional*: the base model's own tensor of this name, which it must equal.

    Raises:
        `EnsembleLoadError`: for a tensor that does not belong in an adapter of this base.
    """
    module_path, part = split_key(key)
    if not key.startswith(PREFIX):
        raise EnsembleLoadError(
            f"{what}: expected tensors of an adapter, whose names start with {PREFIX!r}, found {key!r}."
        )
    if part:
        module = plain_module(base, module_path)
        if module is None:
            raise EnsembleLoadError(f"{what}: tensor {key!r} is for a module that the base model does not have.")
        if part in _SHAPED:
            _check_shape(module, part, key, shape, what)
        return None
    return _other_tensor(base, module_path, key, shape, saved, what)


def embedding_layers(base: nn.Module) -> list[nn.Module]:
    """The input embeddings and the output layer of a base model, with the adapters around them."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        find = getattr(base, name, None)
        try:
            layer = find() if callable(find) else None
        except NotImplementedError:
            continue
        if layer is not None:
            found.append(layer)
    return found


def replaced_modules(config: Mapping[str, Any], base: nn.Module) -> tuple[str, ...]:
    """Names of the modules of which an adapter has a copy: `modules_to_save`, and embeddings that are tied to them.

    PEFT takes every module whose path ends in one of the names.
    """
    names = tuple(config.get("modules_to_save") or ())
    model_config = getattr(base, "config", None)
    if not names or not config.get("ensure_weight_tying") or not getattr(model_config, "tie_word_embeddings", False):
        return names
    layers = embedding_layers(base)
    tied = tuple(path for path, module in base.named_modules() if any(module is layer for layer in layers))
    return (*names, *tied) if any(path.endswith(names) for path in tied) else names


def plain_module(base: nn.Module, path: str) -> nn.Module | None:
    """The base model's own module at this path, without the adapters around it."""
    module = base
    for name in path.split("."):
        module = _unwrapped(module)
        if name in ("base_layer", "original_module", "token_adapter") and not hasattr(module, name):
            continue
        module = module._modules.get(name)
        if module is None:
            return None
    return _unwrapped(module)


def _unwrapped(module: nn.Module) -> nn.Module:
    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        wrapped = isinstance(module, AuxiliaryTrainingWrapper)
        module = module.original_module if wrapped else module.get_base_layer()
    return module


def _check_shape(module: nn.Module, part: str, key: str, shape: tuple[int, ...], what: str) -> None:
    width = _widths(module)
    if width is None:
        return
    inputs, outputs = width
    first, last = (shape[0], shape[-1]) if shape else (0, 0)
    columns = outputs if isinstance(module, nn.Embedding) else inputs
    allowed = {
        "lora_A.weight": [(first, inputs)],
        "lora_B.weight": [(outputs, last)],
        "lora_embedding_A": [(first, inputs)],
        "lora_embedding_B": [(outputs, last)],
        "lora_magnitude_vector": [(outputs,), (1, outputs), (outputs, 1)],
        "lora_magnitude_vector.weight": [(outputs,), (1, outputs), (outputs, 1)],
        "ia3_l": [(1, inputs), (outputs, 1)],
        # One row a token; how many there are, PEFT reads from the configuration.
        "token_adapter.trainable_tokens_delta": [(first, columns)],
    }.get(part, [(outputs,)])
    if shape not in allowed:
        expected = " or ".join(str(list(own)) for own in allowed)
        raise EnsembleLoadError(
            f"{what}: tensor {key!r} has the shape {list(shape)}, expected {expected} for this base model."
        )


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer or an embedding; `None` for other modules, which PEFT checks itself."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    return None


def _other_tensor(base, path: str, key: str, shape, saved, what: str) -> torch.Tensor | None:
    parent, _, name = path.rpartition(".")
    module = plain_module(base, parent)
    own = None if module is None else module.state_dict().get(name)
    if own is None:
        raise EnsembleLoadError(f"{what}: tensor {key!r} does not belong in an adapter for this base model.")
    if tuple(own.shape) != tuple(shape):
        raise EnsembleLoadError(
            f"{what}: tensor {key!r} has the shape {list(shape)}, expected {list(own.shape)} for this base model."
        )
    parts = parent.split(".")
    ancestors = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return None if any(ancestor.endswith(saved) for ancestor in ancestors) else own
