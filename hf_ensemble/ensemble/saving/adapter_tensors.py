"""Checking the tensors of a LoRA adapter's file against the base model's modules."""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...errors import EnsembleLoadError

_PREFIX = "base_model.model."
_LORA_PARTS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "lora_magnitude_vector.weight",
)


def split_key(key: str) -> tuple[str, str]:
    """Module in the base model, and which part of its adapter the tensor is; empty for other tensors."""
    path = key.removeprefix(_PREFIX)
    for part in _LORA_PARTS:
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
        saved (`tuple[str, ...]`): the adapter's `modules_to_save`.
        what (`str`): adapter and file, for messages.

    Returns:
        `torch.Tensor`, *optional*: the base model's own tensor of this name, which it must equal.

    Raises:
        `EnsembleLoadError`: for a tensor that does not belong in a LoRA adapter of this base.
    """
    module_path, part = split_key(key)
    if not key.startswith(_PREFIX):
        raise EnsembleLoadError(
            f"{what}: expected tensors of an adapter, whose names start with {_PREFIX!r}, found {key!r}."
        )
    if part:
        module = plain_module(base, module_path)
        if module is None:
            raise EnsembleLoadError(f"{what}: tensor {key!r} is for a module that the base model does not have.")
        _check_shape(module, part, key, shape, what)
        return None
    if "trainable_tokens_delta" in key or "token_adapter" in key:
        return None
    return _other_tensor(base, module_path, key, shape, saved, what)


def plain_module(base: nn.Module, path: str) -> nn.Module | None:
    """The base model's own module at this path, without the adapters around it."""
    module = base
    for name in path.split("."):
        module = _unwrapped(module)
        if name in ("base_layer", "original_module") and not hasattr(module, name):
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
    rank = shape[0] if part.endswith("_A") or part == "lora_A.weight" else shape[-1]
    expected = {
        "lora_A.weight": (rank, inputs),
        "lora_B.weight": (outputs, rank),
        "lora_embedding_A": (rank, inputs),
        "lora_embedding_B": (outputs, rank),
    }.get(part, (outputs,))
    if shape != expected and not (part.startswith("lora_magnitude") and outputs in shape and len(shape) <= 2):
        raise EnsembleLoadError(
            f"{what}: tensor {key!r} has the shape {list(shape)}, expected {list(expected)} for this base model."
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
        raise EnsembleLoadError(f"{what}: tensor {key!r} does not belong in a LoRA adapter for this base model.")
    if tuple(own.shape) != tuple(shape):
        raise EnsembleLoadError(
            f"{what}: tensor {key!r} has the shape {list(shape)}, expected {list(own.shape)} for this base model."
        )
    # PEFT takes every module whose path ends in one of the names.
    parts = parent.split(".")
    ancestors = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return None if any(ancestor.endswith(saved) for ancestor in ancestors) else own
