"""All adapters of a batch in one forward of the base model, through stacked matrices."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from .adapter_layers import CannotFuseError, is_stackable, replaced_forwards, with_adapter

Stack = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Stacks:
    """Stacked matrices by layer and adapters. They live for one call, in which adapters do not change."""

    matrices: dict[tuple[nn.Module, tuple[str, ...]], Any] = field(default_factory=dict)

    def of(self, layer: nn.Module, names: list[str], make: Callable[[], Any]) -> Any:
        key = (layer, tuple(names))
        if key not in self.matrices:
            self.matrices[key] = make()
        return self.matrices[key]


@contextmanager
def grouped_adapters(model: nn.Module, names: list[str], sizes: list[int], stacks: Stacks) -> Iterator[None]:
    """While open, the first `sizes[0]` rows of every batch are computed with adapter `names[0]`, and so on.

    Linear LoRA layers compute all adapters with one pair of batched products (groups of equal size) or one pair of
    products per group; DoRA, embeddings, convolutions, biases and saved modules run adapter by adapter, each on its
    rows. PEFT's active adapter stays as it is.

    Raises (inside):
        `CannotFuseError`: for a layer that receives another number of rows.
    """
    ends = torch.tensor(sizes).cumsum(0).tolist()
    groups = [(name, slice(end - size, end)) for name, size, end in zip(names, sizes, ends)]

    def compute(layer: nn.Module, plain: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not torch.is_tensor(x) or x.shape[0] != ends[-1]:
            raise CannotFuseError(f"{type(layer).__name__} received other rows than the batch's.")
        if not is_stackable(layer, names):
            outputs = [
                with_adapter(layer, name, plain, x[rows], *of_rows(args, rows, ends[-1]), **kwargs)
                for name, rows in groups
            ]
            return torch.cat(outputs)
        result = layer.base_layer(x, *args, **kwargs)
        stack = stacks.of(layer, names, lambda: stacked_adapters([(layer, name) for name in names]))
        if stack is None:
            return result
        return add_stacked(result, layer._cast_input_dtype(x, stack[0].dtype), stack, [rows for _, rows in groups])

    with replaced_forwards(model, compute):
        yield


def stacked_adapters(adapters: Sequence[tuple[LoraLayer, str]]) -> Stack | None:
    """A `(m, in, r)` and scaled B `(m, r, out)`, ranks padded with zeros; `None` where no adapter has its layer.

    Args:
        adapters (`Sequence[tuple[LoraLayer, str]]`): the layer that each adapter lies in, and its name there.
    """
    held = [(layer, name) for layer, name in adapters if name in layer.lora_A]
    if not held:
        return None
    layer, name = held[0]
    first_a, first_b = layer.lora_A[name].weight, layer.lora_B[name].weight
    rank = max(layer.lora_A[name].weight.shape[0] for layer, name in held)
    downs, ups = [], []
    for layer, name in adapters:
        if name in layer.lora_A:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name]
        else:
            a, b = first_a.new_zeros(0, first_a.shape[1]), first_b.new_zeros(first_b.shape[0], 0)
        missing = rank - a.shape[0]
        downs.append(nn.functional.pad(a, (0, 0, 0, missing)) if missing else a)
        ups.append(nn.functional.pad(b, (0, missing)) if missing else b)
    return torch.stack(downs).transpose(1, 2), torch.stack(ups).transpose(1, 2)


def add_stacked(result: torch.Tensor, x: torch.Tensor, stack: Stack, groups: Sequence[slice]) -> torch.Tensor:
    """A layer's output with what each adapter adds to its rows.

    Args:
        result (`torch.Tensor` of shape `(B, ..., out)`): of the layer without adapters; may be changed without grad.
        x (`torch.Tensor` of shape `(B, ..., in)`): the layer's input, in the adapters' type.
        stack (`Stack`): see [`stacked_adapters`].
        groups (`Sequence[slice]`): the rows of each adapter, one after the other.
    """
    down, up = stack
    if len({rows.stop - rows.start for rows in groups}) == 1:
        return _add_batched(result, x, down, up)
    parts = [x[rows] @ down[k] @ up[k] for k, rows in enumerate(groups)]
    return (result + torch.cat(parts)).to(result.dtype)


def _add_batched(result: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    adapters = len(down)
    hidden = torch.bmm(x.reshape(adapters, -1, x.shape[-1]), down)
    if result.dtype != hidden.dtype or torch.is_grad_enabled() or not result.is_contiguous():
        return (result + torch.bmm(hidden, up).view_as(result)).to(result.dtype)
    # Autocast casts what goes into a product, but not what goes into one that writes in place.
    result.view(adapters, -1, result.shape[-1]).baddbmm_(hidden, up.to(hidden.dtype))
    return result


def of_rows(args: tuple, rows: slice, batch_size: int) -> tuple:
    """Further inputs of a layer, cut to some rows where they have one for each of the batch's."""
    return tuple(a[rows] if torch.is_tensor(a) and a.dim() and a.shape[0] == batch_size else a for a in args)
