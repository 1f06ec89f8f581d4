"""Per-example gradients of linear layers from a single backward pass."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn


class _OutputGradientHook(torch.autograd.Function):
    """Identity on a layer's output whose backward passes the layer's input and the output's gradient to a callback.

    The input is kept by `save_for_backward`, so activation checkpointing can drop and recompute it; a closure would
    keep every input alive. The output is a copy, because in-place changes to a view of it would fail.
    """

    @staticmethod
    def forward(ctx, output, layer_input, receive):
        ctx.save_for_backward(layer_input)
        ctx.receive = receive
        return output.clone()

    @staticmethod
    def backward(ctx, grad_output):
        (layer_input,) = ctx.saved_tensors
        ctx.receive(layer_input, grad_output)
        return grad_output, None, None


@dataclass
class HookState:
    """State of the attached hooks during one batch.

    Args:
        batch_size (`int`): number of examples `B`.
        unusable (`set[str]`): parameters whose layer's inputs did not have one block of rows per example.
        flat (`set[str]`):
            Parameters whose layer was called with one row per example, such as a head after a pooler, or an expert that
            happened to get as many tokens as there are examples.
        fused (`set[str]`): parameters of LoRA layers that ran fused, see [`LoraHooks`].
        active (`bool`, *optional*, defaults to `False`): whether a backward pass delivers gradients.
    """

    batch_size: int
    unusable: set[str] = field(default_factory=set)
    flat: set[str] = field(default_factory=set)
    fused: set[str] = field(default_factory=set)
    active: bool = False


class LinearHooks:
    """Hooks on the linear layers of a model with a trainable weight or bias.

    For a weight W of shape (out, in), input x and output gradient g of shapes (B, T, in) and (B, T, out), the
    gradient of example b is the sum over t of g[b, t] x[b, t]^T; for a bias it is the sum of g[b, t].

    Args:
        model (`nn.Module`): the model.
        parameters (`dict[str, nn.Parameter]`): trainable parameters by name.
    """

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter]):
        names = {id(parameter): name for name, parameter in parameters.items()}
        owners = Counter(id(own) for module in model.modules() for own in module._parameters.values())
        self._layers: list[tuple[nn.Linear, str | None, str | None]] = []
        # Without parameters shared by two modules, whose gradient is the sum over both.
        self.covered: set[str] = set()
        for module in model.modules():
            if isinstance(module, nn.Linear):
                own = [module._parameters.get(kind) for kind in ("weight", "bias")]
                weight, bias = (names.get(id(p)) if p is not None and owners[id(p)] == 1 else None for p in own)
                if weight or bias:
                    self._layers.append((module, weight, bias))
                    self.covered.update(name for name in (weight, bias) if name)

    @contextmanager
    def attached(
        self, state: HookState, names: Sequence[str], receive: Callable[[str, torch.Tensor], None]
    ) -> Iterator[None]:
        """While open and `state` is active, a backward calls `receive(name, gradient)` with `(B, *shape)` gradients.

        Layers whose inputs are not one row or block of rows per example deliver nothing: the caller has to compute the
        gradients of the `unusable` parameters in another way.
        """
        wanted = set(names)

        def hook(weight: str | None, bias: str | None):
            own = {name for name in (weight, bias) if name in wanted}

            def deliver(layer_input, grad_output):
                # The graph outlives the hooks: a later backward must not deliver gradients again.
                if not state.active:
                    return
                if layer_input.dim() < 2 or layer_input.shape[0] != state.batch_size:
                    state.unusable.update(own)
                    return
                g = grad_output.reshape(state.batch_size, -1, grad_output.shape[-1]).float()
                if weight in own:
                    x = layer_input.reshape(state.batch_size, -1, layer_input.shape[-1]).float()
                    # The shorter side first: products with few rows are much faster than products with few columns.
                    wide = x.shape[-1] > g.shape[-1]
                    product = torch.bmm(g.mT, x) if wide else torch.bmm(x.mT, g).mT
                    receive(weight, product)
                if bias in own:
                    receive(bias, g.sum(dim=1))

            def forward_hook(module, inputs, keywords, output):
                if not output.requires_grad:
                    return None
                layer_input = (inputs[0] if inputs else keywords["input"]).detach()
                if layer_input.dim() == 2 and layer_input.shape[0] == state.batch_size > 1:
                    state.flat.update(own)
                return _OutputGradientHook.apply(output, layer_input, deliver)

            return forward_hook

        handles = [
            module.register_forward_hook(hook(weight, bias), with_kwargs=True)
            for module, weight, bias in self._layers
            if weight in wanted or bias in wanted
        ]
        try:
            yield
        finally:
            state.active = False
            for handle in handles:
                handle.remove()
