"""Forward and backward passes of one base model over the rows of several trainings, each through its own adapter."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from ...ensemble.forward.adapter_layers import CannotFuseError, adapter_layers, is_stackable, replaced_forwards
from ...ensemble.forward.fused import add_stacked, of_rows, stacked_adapters

# What a backbone returns for each row, with and without tokens.
_OUTPUTS = ("last_hidden_state", "pooler_output")
_CHECKPOINTING = "_gradient_checkpointing_func"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Whose hooks are on models of any training, and take all rows alike.
_LIBRARIES = {"transformers", "peft", "bitsandbytes"}


@dataclass
class BackboneCall:
    """A call of the backbone by one training.

    Args:
        backbone (`nn.Module`): the training's own, whose frozen parameters are those of all.
        forward (`Callable`): computes it.
        inputs (`dict[str, Any]`): without those that are `None`; `input_ids` of shape `(B, T)`.
        autocast (`tuple[str, bool, torch.dtype]`): the training's, as `torch.autocast` takes it.
    """

    backbone: nn.Module
    forward: Callable[..., Any]
    inputs: dict[str, Any]
    autocast: tuple[str, bool, torch.dtype]

    @property
    def shape(self) -> torch.Size:
        return self.inputs["input_ids"].shape


class SharedPass:
    """One pass through the base model for calls of several trainings.

    The rows of all calls, padded on the right to the longest, run through the base as one batch; in the layers with
    adapters each training's rows run through its own. What each training gets is cut off from the graph: when all of
    them have gone backward to there, [`backward`] takes their gradients through the base at once.

    Args:
        calls (`Sequence[BackboneCall]`): see [`can_share`].

    Attributes:
        outputs (`list[ModelOutput]`): of each call, with the rows and the tokens of its inputs.

    Raises:
        `CannotFuseError`: for a base whose outputs or layers do not have a row for each of the batch's.
    """

    def __init__(self, calls: Sequence[BackboneCall]):
        sizes = [call.shape[0] for call in calls]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self._rows = [slice(end - size, end) for size, end in zip(sizes, ends)]
        self._layers = {own[0]: own for own in zip(*(adapter_layers(call.backbone) for call in calls))}
        self._is_replacing = False
        host = calls[0]
        kind, is_enabled, dtype = host.autocast
        with torch.autocast(kind, dtype, is_enabled), self._checkpointed(host.backbone), self._replacing(host.backbone):
            found = host.forward(**_joined_inputs(calls))
        self._whole = _of_rows(found, ends[-1], max(call.shape[1] for call in calls))
        self.outputs, self._parts = [], []
        for call, rows in zip(calls, self._rows):
            length = call.shape[1]
            parts = {
                name: (own[rows, :length] if own.dim() == 3 else own[rows]).detach().requires_grad_(own.requires_grad)
                for name, own in self._whole.items()
            }
            self._parts.append(parts)
            self.outputs.append(type(found)(**parts))

    def has_gradients(self, number: int) -> bool:
        """Whether a training has gone backward to what it got, since that was last taken through the base."""
        return any(part.grad is not None for part in self._parts[number].values())

    def backward(self) -> None:
        """Add the gradients of all trainings to their adapters; one that has not gone backward adds nothing."""
        wholes, gradients = [], []
        for name, whole in self._whole.items():
            if not whole.requires_grad:
                continue
            gradient = torch.zeros_like(whole)
            for rows, parts in zip(self._rows, self._parts):
                own = parts[name].grad
                if own is not None:
                    (gradient[rows, : own.shape[1]] if own.dim() == 3 else gradient[rows]).copy_(own)
            wholes.append(whole)
            gradients.append(gradient)
        if wholes:
            torch.autograd.backward(wholes, gradients)
        self._whole, self._layers = {}, {}
        for parts in self._parts:
            for part in parts.values():
                part.grad = None

    @contextmanager
    def _replacing(self, module: nn.Module) -> Iterator[None]:
        """While open, layers with adapters in a part of the first backbone compute each training's rows by its own."""
        with replaced_forwards(module, self._compute):
            self._is_replacing = True
            try:
                yield
            finally:
                self._is_replacing = False

    def _compute(self, layer: nn.Module, plain: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not torch.is_tensor(x) or x.shape[0] != self._rows[-1].stop:
            raise CannotFuseError(f"{type(layer).__name__} received other rows than the batch's.")
        layers = self._layers[layer]
        adapters = [(own, name) for own in layers for name in own.active_adapters]
        if len(adapters) != len(layers) or not all(is_stackable(own, [name]) for own, name in adapters):
            forwards, size = [plain, *layers[1:]], x.shape[0]
            outputs = [
                forward(x[rows], *of_rows(args, rows, size), **kwargs) for forward, rows in zip(forwards, self._rows)
            ]
            return torch.cat(outputs)
        result = layer.base_layer(x, *args, **kwargs)
        stack = stacked_adapters(adapters)
        if stack is None:
            return result
        x = layer._cast_input_dtype(x, stack[0].dtype)
        return add_stacked(result, layer.lora_dropout[adapters[0][1]](x), stack, self._rows)

    @contextmanager
    def _checkpointed(self, backbone: nn.Module) -> Iterator[None]:
        """While open, what is computed once more in the backward pass will be computed as in the forward pass."""

        def keeping(plain: Callable, module: nn.Module, function: Callable, *args: Any, **kwargs: Any) -> Any:
            @functools.wraps(function)
            def computed(*inputs: Any, **others: Any) -> Any:
                with ExitStack() as stack:
                    if not self._is_replacing:
                        stack.enter_context(self._replacing(module))
                    return function(*inputs, **others)

            return plain(computed, *args, **kwargs)

        found = [
            module
            for module in backbone.modules()
            if getattr(module, "gradient_checkpointing", False) and _CHECKPOINTING in vars(module)
        ]
        before = [vars(module)[_CHECKPOINTING] for module in found]
        for module, plain in zip(found, before):
            setattr(module, _CHECKPOINTING, functools.partial(keeping, plain, module))
        try:
            yield
        finally:
            for module, plain in zip(found, before):
                setattr(module, _CHECKPOINTING, plain)


def can_share(calls: Sequence[BackboneCall]) -> bool:
    """Whether the inputs of these calls make up one batch: tensors with a number for each token, all else alike."""
    first = calls[0]
    for call in calls:
        if call.inputs.keys() != first.inputs.keys() or call.autocast != first.autocast:
            return False
        for name, value in call.inputs.items():
            is_tensor = torch.is_tensor(value)
            if is_tensor and value.shape != call.shape:
                return False
            if is_tensor != torch.is_tensor(first.inputs[name]) or not (is_tensor or value == first.inputs[name]):
                return False
    return "attention_mask" in first.inputs or len({call.shape[1] for call in calls}) == 1


def hooked_part(backbone: nn.Module) -> str | None:
    """The name of a part with a hook of its own, which would see all rows of a shared pass, or none; `None` without.

    Those of the backbone itself see what each training passes in and gets.
    """
    for name, module in backbone.named_modules():
        if module is not backbone and any(_is_own(hook) for kind in _HOOKS for hook in getattr(module, kind).values()):
            return name
    return None


def _is_own(hook: Callable) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    # Builtins have none.
    return str(hook.__module__).partition(".")[0] not in _LIBRARIES


def _joined_inputs(calls: Sequence[BackboneCall]) -> dict[str, Any]:
    """The inputs of all calls as one batch, padded on the right, where attention is masked."""
    length = max(call.shape[1] for call in calls)
    padding = {"input_ids": getattr(calls[0].backbone.config, "pad_token_id", None) or 0}
    joined = dict(calls[0].inputs)
    for name, value in joined.items():
        if torch.is_tensor(value):
            joined[name] = torch.cat(
                [
                    nn.functional.pad(call.inputs[name], (0, length - call.shape[1]), value=padding.get(name, 0))
                    for call in calls
                ]
            )
    return joined


def _of_rows(found: Any, num_rows: int, length: int) -> dict[str, torch.Tensor]:
    """The tensors of a backbone's output, all of which have a row for each of the batch's."""
    outputs = dict(found) if isinstance(found, ModelOutput) else {}
    if not outputs or not outputs.keys() <= set(_OUTPUTS):
        raise CannotFuseError(f"A {type(found).__name__} of {sorted(outputs)} cannot be taken apart by rows.")
    for name, value in outputs.items():
        if value.shape[: value.dim() - 1] != (num_rows, length)[: value.dim() - 1]:
            raise CannotFuseError(
                f"{name} of the shape {tuple(value.shape)} does not have the batch's rows and tokens."
            )
    return outputs
