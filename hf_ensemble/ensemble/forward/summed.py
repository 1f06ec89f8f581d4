"""One forward of the base model with the weighted sum of the adapters' deltas in its weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import Cache

from ...errors import EnsembleError
from .adapter_layers import CannotFuseError, is_stackable, replaced_forwards, with_adapter
from .fused import Stacks

_STACKS_ATTRIBUTE = "_hf_ensemble_stacks"


def kept_stacks(cache: Any) -> Stacks:
    """The adapters' concatenated matrices of the earlier calls of a decoding; they are made once."""
    known = getattr(cache, _STACKS_ATTRIBUTE, None)
    if known is None or torch.is_grad_enabled():
        return Stacks()
    return known


def keep_stacks(cache: Any, stacks: Stacks) -> None:
    """Keep them with the key-value states for the next call."""
    if isinstance(cache, Cache) and not torch.is_grad_enabled():
        setattr(cache, _STACKS_ATTRIBUTE, stacks)


@contextmanager
def summed_weights(
    model: PeftModel, names: Sequence[str], weights: torch.Tensor, stacks: Stacks | None = None
) -> Iterator[None]:
    """While open, the base model computes each row with the weighted sum of the adapters' deltas.

    Args:
        model (`PeftModel`): holds the adapters.
        names (`Sequence[str]`): adapter names, in the order of the weights' columns.
        weights (`torch.Tensor` of shape `(batch_size, len(names))`): weight of each adapter for each row.
        stacks (`Stacks`, *optional*): stacks of an earlier call with the same adapters.

    Raises:
        `EnsembleError`: for a model with a layer that cannot sum adapters.
    """
    used = weights.any(0).nonzero().squeeze(1).tolist()
    try:
        with summed_adapters(model, [names[k] for k in used], weights[:, used], stacks or Stacks()):
            yield
    except CannotFuseError as error:
        raise EnsembleError(
            f"The combination 'weights' cannot be computed: {error} Use 'logits', or, of adapters that can be merged, "
            "load what merge(task) gives alone."
        ) from error


@contextmanager
def summed_adapters(model: nn.Module, names: list[str], weights: torch.Tensor, stacks: Stacks) -> Iterator[None]:
    """While open, the model's weights are, for each row, the base's plus the weighted sum of the adapters' deltas.

    Linear LoRA layers use the adapters' concatenated factors. For any other layer, the changes that the adapters
    make to its output are summed, which is the same for layers that are linear in their parameters (DoRA, embeddings,
    saved linear heads). Of saved modules with several layers, the parameters are summed.

    Args:
        weights (`torch.Tensor` of shape `(batch_size, len(names))`): weight of each adapter for each row. A batch
            that is a multiple of these rows repeats each of them, as beams do.
    """
    same = bool((weights == weights[:1]).all())
    # Read once: every layer that read them from a device would wait for it.
    shared = weights[0].tolist() if same else None
    key = names if shared is None else [*names, str(shared)]

    def compute(layer: nn.Module, plain: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not is_stackable(layer, names):
            own = _row_weights(weights, x, same)
            if isinstance(layer, ModulesToSaveWrapper) and next(layer.original_module.children(), None) is not None:
                return _with_summed_parameters(layer, names, own, x, *args, **kwargs)
            base = with_adapter(layer, None, plain, x, *args, **kwargs)
            total = base
            for column, name in enumerate(names):
                change = with_adapter(layer, name, plain, x, *args, **kwargs) - base
                total = total + _over(own[:, column], change) * change
            return total.to(base.dtype)
        result = layer.base_layer(x, *args, **kwargs)
        stack = stacks.of(layer, key, lambda: _concatenated(layer, names, shared))
        if stack is None:
            return result
        down, up, owner = stack
        hidden = nn.functional.linear(layer._cast_input_dtype(x, down.dtype), down)
        if not same:
            own = _row_weights(weights, x, same)[:, owner].to(hidden.dtype)
            hidden = hidden * own.view(len(own), *[1] * (hidden.dim() - 2), -1)
        return (result + nn.functional.linear(hidden, up)).to(result.dtype)

    with replaced_forwards(model, compute):
        yield


def _concatenated(layer: LoraLayer, names: list[str], weights: list[float] | None):
    """A `(R, in)`, scaled B `(out, R)` and the number of the adapter that each of the R dimensions belongs to."""
    held = [(k, name) for k, name in enumerate(names) if name in layer.lora_A]
    if not held:
        return None
    factor = {k: layer.scaling[name] * (1.0 if weights is None else weights[k]) for k, name in held}
    down = torch.cat([layer.lora_A[name].weight for _, name in held])
    up = torch.cat([layer.lora_B[name].weight * factor[k] for k, name in held], 1)
    owner = torch.cat([torch.full((layer.lora_A[name].weight.shape[0],), k) for k, name in held])
    return down, up, owner.to(down.device)


def _with_summed_parameters(
    layer: ModulesToSaveWrapper, names: list[str], weights: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """The output of a saved module of several layers, with one sum of parameters for each distinct row of weights."""
    held = [(k, layer.modules_to_save[name]) for k, name in enumerate(names) if name in layer.modules_to_save]
    parameters = [(k, dict(module.named_parameters())) for k, module in held]
    distinct, kinds = weights.unique(dim=0, return_inverse=True)
    rows, outputs = [], []
    for number, own in enumerate(distinct):
        summed = {
            key: value + sum(own[k].to(value) * (changed[key] - value) for k, changed in parameters)
            for key, value in layer.original_module.named_parameters()
        }
        rows.append((kinds == number).nonzero().squeeze(1))
        some = x if len(distinct) == 1 else x[rows[-1]]
        outputs.append(torch.func.functional_call(layer.original_module, summed, (some, *args), kwargs))
    return torch.cat(outputs)[torch.cat(rows).argsort()]


def _row_weights(weights: torch.Tensor, x: torch.Tensor, same: bool) -> torch.Tensor:
    if same:
        return weights[:1].expand(x.shape[0], -1)
    if x.shape[0] % len(weights):
        raise CannotFuseError("A layer received other rows than the batch's.")
    return weights.repeat_interleave(x.shape[0] // len(weights), 0)


def _over(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return weights.view(-1, *[1] * (values.dim() - 1)).to(values.dtype)
