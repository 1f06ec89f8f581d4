"""LoRA layers read as a whole, which saves most of what their own forward and backward cost beside the base layer."""

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager

import torch
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable

from .linear_hooks import Reading

# What these do in training is known: base(x) + scaling * B A x. A subclass may do something else.
_KNOWN = ("Linear", "Linear4bit", "Linear8bitLt")


class _LowRankUpdate(torch.autograd.Function):
    """`result + scaling * x A^T B^T` of rows `(n, out)` and `(n, in)`, added up in the factors' precision.

    Its backward hands over what both factors' per-example gradients are made of. Their summed gradients, which nobody
    asks for, are not taken: zeros stand for them, to tell that the parameters were reached.
    """

    @staticmethod
    def forward(ctx, result, x, a, b, scaling, receive):
        inner = x.to(a.dtype) @ a.T
        ctx.save_for_backward(x, inner, a, b)
        ctx.scaling, ctx.receive = scaling, receive
        return torch.addmm(result.to(a.dtype), inner, b.T, alpha=scaling).to(result.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, inner, a, b = ctx.saved_tensors
        # Of scaling * A x.
        grad_inner = (grad_output.to(b.dtype) @ b).mul_(ctx.scaling)
        ctx.receive(x, inner, grad_output, grad_inner)
        grad_x = (grad_inner @ a).to(x.dtype) if ctx.needs_input_grad[1] else None
        reached = grad_inner.new_zeros(())
        return grad_output, grad_x, reached.expand_as(a), reached.expand_as(b), None, None


class LoraTaps:
    """Stands in for the forward of plain LoRA layers around frozen linear ones.

    With u = A x, g the output's gradient and v = scaling * B^T g, the gradient of example b is the sum over its
    tokens t of v[b, t] x[b, t]^T for A, and of scaling * g[b, t] u[b, t]^T for B.

    Layers with another variant (DoRA), a LoRA bias, hooks on their parts or several active adapters run as they are, as
    all do under autocast, and are read by [`LinearTaps`].

    Args:
        model (`nn.Module`): the model.
        parameters (`dict[str, nn.Parameter]`): the trained parameters, by name.
    """

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter]):
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        known = {getattr(lora, name) for name in _KNOWN if hasattr(lora, name)}
        self._layers = [module for module in model.modules() if type(module) in known]
        # Parameters whose layers are left as they are, because a batch showed another gradient.
        self.refused: set[str] = set()

    def readable(self, wanted: Set[str]) -> dict[str, LoraLayer]:
        """The layer of each parameter that can be read as a whole as things stand, of those `wanted`.

        Parameters that two modules share are not to be wanted: [`LinearTaps`] does not cover them.
        """
        found = {}
        for layer in self._layers:
            adapter = _adapter(layer)
            if adapter is None:
                continue
            names = [self._names.get(id(factors[adapter].weight)) for factors in (layer.lora_A, layer.lora_B)]
            if wanted >= set(names) and not self.refused.intersection(names):
                found |= dict.fromkeys(names, layer)
        return found

    @contextmanager
    def reading(self, state: Reading, wanted: Set[str], receive: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
        """While open and `state` active, a backward calls `receive(name, gradient)` with gradients `(B, *parameter)`.

        Has to be opened before other hooks are set. `state.whole` gets the parameters that it was done for.
        """
        layers = list(dict.fromkeys(self.readable(wanted).values()))
        try:
            for layer in layers:
                layer.forward = self._forward(layer, state, receive)
            yield
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)

    def _forward(self, layer: LoraLayer, state: Reading, receive: Callable[[str, torch.Tensor], None]):
        adapter = _adapter(layer)
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        scaling, own = layer.scaling[adapter], type(layer).forward
        name_a, name_b = self._names[id(a)], self._names[id(b)]

        def take(x, inner, grad_output, grad_inner):
            if not state.active:
                return
            # Few rows first, as in the linear layers' taps.
            receive(name_a, torch.bmm(_by_example(grad_inner, state).mT, _by_example(x, state)))
            receive(name_b, torch.bmm(_by_example(inner, state).mT * scaling, _by_example(grad_output, state)).mT)

        def forward(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
            in_blocks = x.dim() > 2 and x.shape[0] == state.batch_size
            if args or kwargs or not in_blocks or torch.is_autocast_enabled(x.device.type):
                return own(layer, x, *args, **kwargs)
            state.whole.update((name_a, name_b))
            result = layer.base_layer(x)
            rows = _LowRankUpdate.apply(result.flatten(0, -2), x.flatten(0, -2), a, b, scaling, take)
            # A view of the function's output may be changed in place behind it, the output of a view may not.
            return rows.view(result.shape)

        return forward


def _adapter(layer: LoraLayer) -> str | None:
    """The one active adapter of a layer that does nothing but add its low-rank update; `None` for others."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] in layer.lora_variant:
        return None
    factors = [layer.lora_A[active[0]], layer.lora_B[active[0]]]
    parts = [layer, layer.lora_dropout[active[0]], *factors]
    plain = all(type(factor) is nn.Linear and factor.bias is None for factor in factors)
    plain &= layer.cast_input_dtype_enabled and factors[0].weight.dtype == factors[1].weight.dtype
    return active[0] if plain and all(_is_untouched(part) for part in parts) else None


def _is_untouched(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" not in module.__dict__ and not any(hooks)


def _by_example(rows: torch.Tensor, state: Reading) -> torch.Tensor:
    """`(B, tokens, width)` in float32."""
    return rows.reshape(state.batch_size, -1, rows.shape[-1]).float()
