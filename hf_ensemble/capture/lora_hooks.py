"""Per-example gradients of plain LoRA layers, which run fused to save most of their overhead over the base layer."""

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager

import torch
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable

from .linear_hooks import HookState

# Classes whose forward is known: base(x) + scaling * B A x. Subclasses may do something else.
_PLAIN_CLASSES = ("Linear", "Linear4bit", "Linear8bitLt")


class _LowRankUpdate(torch.autograd.Function):
    """`result + scaling * x A^T B^T` for rows `(n, out)` and `(n, in)`, with products in `dtype`.

    Its backward passes what the per-example gradients of both factors are made of to a callback. It does not compute
    their summed gradients, which nobody needs: zeros in their place show that the parameters were used.
    """

    @staticmethod
    def forward(ctx, result, x, a, b, scaling, dtype, receive):
        ctx.scaling, ctx.receive, ctx.x_dtype, ctx.factor_dtype = scaling, receive, x.dtype, a.dtype
        # The data types are explicit: autocast would also lower the sum.
        with torch.autocast(x.device.type, enabled=False):
            low_x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
            inner = low_x @ a.T
            # Whichever takes less memory.
            ctx.save_for_backward(low_x if low_x.itemsize < x.itemsize else x, inner, a, b)
            if torch.promote_types(result.dtype, dtype) == dtype:
                return torch.addmm(result.to(dtype), inner, b.T, alpha=scaling).to(result.dtype)
            return torch.add(result, (inner @ b.T).to(result.dtype), alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, inner, a, b = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            # Gradient of A x.
            grad_inner = (grad_output.to(b.dtype) @ b).mul_(ctx.scaling)
            ctx.receive(x, inner, grad_output, grad_inner)
            grad_x = (grad_inner @ a).to(ctx.x_dtype) if ctx.needs_input_grad[1] else None
        zero = grad_inner.new_zeros((), dtype=ctx.factor_dtype)
        return grad_output, grad_x, zero.expand_as(a), zero.expand_as(b), None, None, None


class LoraHooks:
    """Replaces the forward of plain LoRA layers around frozen linear layers by a fused one.

    With u = A x, the output's gradient g and v = scaling * B^T g, the gradient of example b is the sum over its tokens
    t of v[b, t] x[b, t]^T for A, and of scaling * g[b, t] u[b, t]^T for B.

    Layers with another variant (DoRA), a LoRA bias, hooks on their parts or more than one active adapter run as they
    are, and their factors get [`LinearHooks`].

    Args:
        model (`nn.Module`): the model.
        parameters (`dict[str, nn.Parameter]`): trainable parameters by name.
    """

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter]):
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        known = {getattr(lora, name) for name in _PLAIN_CLASSES if hasattr(lora, name)}
        self._layers = [module for module in model.modules() if type(module) in known]
        # Parameters whose layers keep their own forward, because the fused one gave other gradients.
        self.disabled: set[str] = set()

    def fusible(self, wanted: Set[str]) -> dict[str, LoraLayer]:
        """Layers that can run fused in their present state, by the names of their parameters among those `wanted`.

        `wanted` must not have parameters that two modules share, which [`LinearHooks`] does not cover either.
        """
        found = {}
        for layer in self._layers:
            adapter = _plain_adapter(layer)
            if adapter is None:
                continue
            names = [self._names.get(id(factors[adapter].weight)) for factors in (layer.lora_A, layer.lora_B)]
            if wanted >= set(names) and not self.disabled.intersection(names):
                found |= dict.fromkeys(names, layer)
        return found

    @contextmanager
    def attached(
        self, state: HookState, wanted: Set[str], receive: Callable[[str, torch.Tensor], None]
    ) -> Iterator[None]:
        """While open and `state` is active, a backward calls `receive(name, gradient)` with `(B, *shape)` gradients.

        Has to be opened before other hooks are attached. Adds the parameters of fused layers to `state.fused`.
        """
        layers = list(dict.fromkeys(self.fusible(wanted).values()))
        try:
            for layer in layers:
                layer.forward = self._fused_forward(layer, state, receive)
            yield
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)

    def _fused_forward(self, layer: LoraLayer, state: HookState, receive: Callable[[str, torch.Tensor], None]):
        adapter = _plain_adapter(layer)
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        scaling, own_forward = layer.scaling[adapter], type(layer).forward
        name_a, name_b = self._names[id(a)], self._names[id(b)]

        def deliver(x, inner, grad_output, grad_inner):
            if not state.active:
                return
            # Products with few rows first, as in LinearHooks.
            receive(name_a, torch.bmm(_by_example(grad_inner, state).mT, _by_example(x, state)))
            receive(name_b, torch.bmm(_by_example(inner, state).mT * scaling, _by_example(grad_output, state)).mT)

        def forward(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
            in_blocks = x.dim() > 2 and x.shape[0] == state.batch_size
            if args or kwargs or not in_blocks:
                return own_forward(layer, x, *args, **kwargs)
            state.fused.update((name_a, name_b))
            result = layer.base_layer(x)
            device = x.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.dtype
            rows = _LowRankUpdate.apply(result.flatten(0, -2), x.flatten(0, -2), a, b, scaling, dtype, deliver)
            # In-place changes are allowed on a view of the function's output, not on the output of a view.
            return rows.view(result.shape)

        return forward


def _plain_adapter(layer: LoraLayer) -> str | None:
    """The only active adapter of a layer that just adds its low-rank update; `None` for other layers."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] in layer.lora_variant:
        return None
    factors = [layer.lora_A[active[0]], layer.lora_B[active[0]]]
    parts = [layer, layer.lora_dropout[active[0]], *factors]
    plain = all(type(factor) is nn.Linear and factor.bias is None for factor in factors)
    plain &= layer.cast_input_dtype_enabled and factors[0].weight.dtype == factors[1].weight.dtype
    return active[0] if plain and all(_is_unmodified(part) for part in parts) else None


def _is_unmodified(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" not in module.__dict__ and not any(hooks)


def _by_example(rows: torch.Tensor, state: HookState) -> torch.Tensor:
    """`(B, tokens, width)` in float32."""
    return rows.reshape(state.batch_size, -1, rows.shape[-1]).float()
