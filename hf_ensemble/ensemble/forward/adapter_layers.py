"""The layers of a PEFT model that hold adapters: finding them, choosing their adapter, replacing their forward."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

try:
    from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

    _STACKABLE: tuple[type, ...] = (LoraLinear, Linear4bit, Linear8bitLt)
except ImportError:  # bitsandbytes is not usable on this machine
    _STACKABLE = (LoraLinear,)


class CannotFuseError(Exception):
    """A layer's rows are not those of the batch, so that the adapter of each is not known."""


def adapter_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost layers of a PEFT model that hold adapters."""
    for child in module.children():
        if isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield child
        else:
            yield from adapter_layers(child)


def is_linear_lora(layer: nn.Module) -> bool:
    """Whether this is a linear layer with LoRA adapters, quantized or not."""
    return type(layer) in _STACKABLE


def is_stackable(layer: nn.Module, names: list[str]) -> bool:
    """Whether the layer adds B A x scaling for each of these adapters, and nothing else."""
    if not is_linear_lora(layer) or layer.merged or layer.disable_adapters:
        return False
    return not any(name in layer.lora_variant or layer.lora_bias.get(name) for name in names)


@contextmanager
def active_adapter(layers: Iterable[nn.Module], name: str | None) -> Iterator[None]:
    """While open, these layers use one adapter, or none; PEFT's active adapter and `requires_grad` stay as they are."""
    held = [
        module
        for layer in layers
        for module in layer.modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]
    before = [(module, module._active_adapter, module._disable_adapters) for module in held]
    try:
        for module in held:
            if name is None or name not in module._get_available_adapters():
                module._disable_adapters = True
            else:
                module._active_adapter = [name]
        yield
    finally:
        for module, active, disabled in before:
            module._active_adapter, module._disable_adapters = active, disabled


def with_adapter(layer: nn.Module, name: str | None, plain: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The layer's own forward with one adapter, or with none."""
    with active_adapter([layer], name):
        return plain(*args, **kwargs)


@contextmanager
def replaced_forwards(model: nn.Module, replacement: Callable) -> Iterator[None]:
    """While open, `replacement(layer, plain_forward, x, ...)` computes every layer that holds adapters."""
    patched = []
    try:
        for layer in adapter_layers(model):
            # Every decoded token comes by here: a module's own `__setattr__` and `hasattr` take several times as long.
            own = layer.__dict__
            if "forward" in own or "parameter_name" in own:
                # A forward that something else replaced, or an adapter of bare parameters, which works without one.
                raise CannotFuseError(f"The forward of {type(layer).__name__} cannot be replaced.")
            own["forward"] = functools.partial(replacement, layer, layer.forward)
            patched.append(layer)
        yield
    finally:
        for layer in patched:
            del layer.__dict__["forward"]
