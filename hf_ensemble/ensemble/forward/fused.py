"""All adapters of a batch in one forward of the base model, through stacked matrices."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

try:
    from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

    _STACKABLE: tuple[type, ...] = (LoraLinear, Linear4bit, Linear8bitLt)
except ImportError:  # bitsandbytes is not usable on this machine
    _STACKABLE = (LoraLinear,)

Stack = tuple[torch.Tensor, torch.Tensor]


class CannotFuseError(Exception):
    """A layer does not see the batch's rows as its rows, so it cannot tell which adapter each belongs to."""


@dataclass
class Stacks:
    """Stacked matrices by layer and adapters, kept for as long as the adapters do not change: one call."""

    matrices: dict[tuple[nn.Module, tuple[str, ...]], Any] = field(default_factory=dict)

    def of(self, layer: nn.Module, names: list[str], make: Callable[[], Any]) -> Any:
        key = (layer, tuple(names))
        if key not in self.matrices:
            self.matrices[key] = make()
        return self.matrices[key]


def adapter_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost layers of a PEFT model that hold adapters."""
    for child in module.children():
        if isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield child
        else:
            yield from adapter_layers(child)


@contextmanager
def grouped_adapters(model: nn.Module, names: list[str], sizes: list[int], stacks: Stacks) -> Iterator[None]:
    """While open, the first `sizes[0]` rows of every batch are computed with adapter `names[0]`, and so on.

    Linear LoRA layers compute all adapters with one pair of batched products (groups of equal size) or one pair of
    products per group; DoRA, embeddings, convolutions, biases and saved modules run adapter by adapter, each on its
    rows. PEFT's active adapter is not touched.

    Raises (inside):
        `CannotFuseError`: from a layer that gets another number of rows.
    """
    ends = torch.tensor(sizes).cumsum(0).tolist()
    groups = [(name, slice(end - size, end)) for name, size, end in zip(names, sizes, ends)]
    equal = len(set(sizes)) == 1

    def serve(layer: nn.Module, plain: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not torch.is_tensor(x) or x.shape[0] != ends[-1]:
            raise CannotFuseError(f"{type(layer).__name__} got other rows than the batch's.")
        if not _is_stackable(layer, names):
            outputs = [
                _with_adapter(layer, name, plain, x[rows], *_of_rows(args, rows, ends[-1]), **kwargs)
                for name, rows in groups
            ]
            return torch.cat(outputs)
        result = layer.base_layer(x, *args, **kwargs)
        stack = stacks.of(layer, names, lambda: _stacked(layer, names))
        if stack is None:
            return result
        down, up = stack
        x = layer._cast_input_dtype(x, down.dtype)
        if equal:
            return _add_batched(result, x, down, up)
        parts = [x[rows] @ down[k] @ up[k] for k, (_, rows) in enumerate(groups)]
        return (result + torch.cat(parts)).to(result.dtype)

    with _serving(model, serve):
        yield


@contextmanager
def summed_adapters(model: nn.Module, names: list[str], weights: torch.Tensor, stacks: Stacks) -> Iterator[None]:
    """While open, the model's weights are, for each row, the base's plus the weighted sum of the adapters' deltas.

    Linear LoRA layers use the adapters' concatenated factors. For any other layer the change that each adapter makes
    to the layer's output is summed, which is the same for what is linear in its parameters (DoRA, embeddings, saved
    linear heads).

    Args:
        weights (`torch.Tensor` of shape `(batch_size, len(names))`): weight of each adapter for each row. A batch
            that is a multiple of these rows repeats each of them, as beams do.
    """
    same = bool((weights == weights[:1]).all())
    key = [*names, str(weights[0].tolist())] if same else names

    def serve(layer: nn.Module, plain: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not _is_stackable(layer, names):
            own = _row_weights(weights, x, same)
            base = _with_adapter(layer, None, plain, x, *args, **kwargs)
            total = base
            for column, name in enumerate(names):
                change = _with_adapter(layer, name, plain, x, *args, **kwargs) - base
                total = total + _over(own[:, column], change) * change
            return total.to(base.dtype)
        result = layer.base_layer(x, *args, **kwargs)
        stack = stacks.of(layer, key, lambda: _concatenated(layer, names, weights[0] if same else None))
        if stack is None:
            return result
        down, up, owner = stack
        hidden = nn.functional.linear(layer._cast_input_dtype(x, down.dtype), down)
        if not same:
            own = _row_weights(weights, x, same)[:, owner].to(hidden.dtype)
            hidden = hidden * own.view(len(own), *[1] * (hidden.dim() - 2), -1)
        return (result + nn.functional.linear(hidden, up)).to(result.dtype)

    with _serving(model, serve):
        yield


@contextmanager
def _serving(model: nn.Module, serve: Callable) -> Iterator[None]:
    """While open, `serve(layer, plain_forward, x, ...)` computes every layer that holds adapters."""
    patched = []
    try:
        for layer in adapter_layers(model):
            if "forward" in layer.__dict__ or hasattr(layer, "parameter_name"):
                # Wrapped by someone else, or an adapter of bare parameters, which works without a forward.
                raise CannotFuseError(f"{type(layer).__name__} cannot be served.")
            layer.forward = functools.partial(serve, layer, layer.forward)
            patched.append(layer)
        yield
    finally:
        for layer in patched:
            del layer.forward


def is_linear_lora(layer: nn.Module) -> bool:
    """Whether the layer is a linear one with LoRA adapters, quantized or not."""
    return type(layer) in _STACKABLE


def _is_stackable(layer: nn.Module, names: list[str]) -> bool:
    """Whether the layer adds B A x scaling for each of these adapters, and nothing else."""
    if not is_linear_lora(layer) or layer.merged or layer.disable_adapters:
        return False
    return not any(name in layer.lora_variant or layer.lora_bias.get(name) for name in names)


def _stacked(layer: LoraLayer, names: list[str]) -> Stack | None:
    """A `(m, in, r)` and scaled B `(m, r, out)`, ranks filled up with zeros; `None` where no adapter has the layer."""
    held = [name for name in names if name in layer.lora_A]
    if not held:
        return None
    first_a, first_b = layer.lora_A[held[0]].weight, layer.lora_B[held[0]].weight
    rank = max(layer.lora_A[name].weight.shape[0] for name in held)
    downs, ups = [], []
    for name in names:
        if name in layer.lora_A:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name]
        else:
            a, b = first_a.new_zeros(0, first_a.shape[1]), first_b.new_zeros(first_b.shape[0], 0)
        missing = rank - a.shape[0]
        downs.append(nn.functional.pad(a, (0, 0, 0, missing)) if missing else a)
        ups.append(nn.functional.pad(b, (0, missing)) if missing else b)
    return torch.stack(downs).transpose(1, 2), torch.stack(ups).transpose(1, 2)


def _concatenated(layer: LoraLayer, names: list[str], weights: torch.Tensor | None):
    """A `(R, in)`, scaled B `(out, R)` and the number of the adapter that each of the R dimensions belongs to."""
    held = [(k, name) for k, name in enumerate(names) if name in layer.lora_A]
    if not held:
        return None
    factor = {k: layer.scaling[name] * (1.0 if weights is None else float(weights[k])) for k, name in held}
    down = torch.cat([layer.lora_A[name].weight for _, name in held])
    up = torch.cat([layer.lora_B[name].weight * factor[k] for k, name in held], 1)
    owner = torch.cat([torch.full((layer.lora_A[name].weight.shape[0],), k) for k, name in held])
    return down, up, owner.to(down.device)


def _add_batched(result: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    adapters = len(down)
    hidden = torch.bmm(x.reshape(adapters, -1, x.shape[-1]), down)
    if result.dtype != hidden.dtype or torch.is_grad_enabled() or not result.is_contiguous():
        return (result + torch.bmm(hidden, up).view_as(result)).to(result.dtype)
    # Autocast casts what goes into a product, but not what goes into one that writes in place.
    result.view(adapters, -1, result.shape[-1]).baddbmm_(hidden, up.to(hidden.dtype))
    return result


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


def _with_adapter(layer: nn.Module, name: str | None, plain: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The layer's own forward with one adapter, or with none."""
    with active_adapter([layer], name):
        return plain(*args, **kwargs)


def _of_rows(args: tuple, rows: slice, batch_size: int) -> tuple:
    return tuple(a[rows] if torch.is_tensor(a) and a.dim() and a.shape[0] == batch_size else a for a in args)


def _row_weights(weights: torch.Tensor, x: torch.Tensor, same: bool) -> torch.Tensor:
    if same:
        return weights[:1].expand(x.shape[0], -1)
    if x.shape[0] % len(weights):
        raise CannotFuseError("A layer got other rows than the batch's.")
    return weights.repeat_interleave(x.shape[0] // len(weights), 0)


def _over(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return weights.view(-1, *[1] * (values.dim() - 1)).to(values.dtype)
