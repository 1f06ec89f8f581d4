"""Per-example gradients of linear layers, read off one backward pass."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn


class _Tap(torch.autograd.Function):
    """Identity on a layer's output; its backward hands over the layer's input and the output's gradient.

    The input is kept by `save_for_backward`, so activation checkpointing can drop and recompute it; a closure would
    keep every input alive. The output is a copy, since a view of it could not be changed in place afterwards.
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
class Reading:
    """The state of open hooks.

    Args:
        batch_size (`int`): examples `B`.
        unusable (`set[str]`): parameters whose layer was called with inputs that are not one block of rows per example.
        flat (`set[str]`): parameters whose layer was called with one row per example, as a head behind a pooler is,
            or an expert that by chance got as many tokens as there are examples.
        whole (`set[str]`): parameters of LoRA layers that were read as a whole ([`LoraTaps`]).
        active (`bool`, *optional*, defaults to `False`): whether a backward hands gradients over.
    """

    batch_size: int
    unusable: set[str] = field(default_factory=set)
    flat: set[str] = field(default_factory=set)
    whole: set[str] = field(default_factory=set)
    active: bool = False


class LinearTaps:
    """Hooks on the linear layers of a model whose weight or bias is trained.

    For a weight W of shape (out, in), input x and output gradient g of shapes (B, T, in) and (B, T, out), the
    gradient of example b is the sum over t of g[b, t] x[b, t]^T; for a bias it is the sum of g[b, t].

    Args:
        model (`nn.Module`): the model.
        parameters (`dict[str, nn.Parameter]`): the trained parameters, by name.
    """

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter]):
        names = {id(parameter): name for name, parameter in parameters.items()}
        owners = Counter(id(own) for module in model.modules() for own in module._parameters.values())
        self._layers: list[tuple[nn.Linear, str | None, str | None]] = []
        # A parameter of two modules would need the sum over both, which only the fallback takes.
        self.covered: set[str] = set()
        for module in model.modules():
            if isinstance(module, nn.Linear):
                own = [module._parameters.get(kind) for kind in ("weight", "bias")]
                weight, bias = (names.get(id(p)) if p is not None and owners[id(p)] == 1 else None for p in own)
                if weight or bias:
                    self._layers.append((module, weight, bias))
                    self.covered.update(name for name in (weight, bias) if name)

    @contextmanager
    def reading(
        self, state: Reading, names: Sequence[str], receive: Callable[[str, torch.Tensor], None]
    ) -> Iterator[None]:
        """While open and `state` active, a backward calls `receive(name, gradient)` with gradients `(B, *parameter)`.

        What layers that do not see one row (or block of rows) per example hand over is left out: the caller has to take
        the gradients of `unusable` parameters in another way.
        """
        wanted = set(names)

        def hook(weight: str | None, bias: str | None):
            own = {name for name in (weight, bias) if name in wanted}

            def take(layer_input, grad_output):
                # The graph outlives the hooks: a later backward must not hand gradients over again.
                if not state.active:
                    return
                if layer_input.dim() < 2 or layer_input.shape[0] != state.batch_size:
                    state.unusable.update(own)
                    return
                g = grad_output.reshape(state.batch_size, -1, grad_output.shape[-1]).float()
                if weight in own:
                    x = layer_input.reshape(state.batch_size, -1, layer_input.shape[-1]).float()
                    # The shorter side first: a product with few rows is several times as fast as one with few columns.
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
                return _Tap.apply(output, layer_input, take)

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
