"""Per-example gradients of linear layers, read off one backward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


class _Tap(torch.autograd.Function):
    """Identity on a layer's output; its backward hands over the layer's input and the output's gradient.

    The input is kept by `save_for_backward`, so activation checkpointing can drop and recompute it; a closure would
    keep every input alive.
    """

    @staticmethod
    def forward(ctx, output, layer_input, receive):
        ctx.save_for_backward(layer_input)
        ctx.receive = receive
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad_output):
        (layer_input,) = ctx.saved_tensors
        ctx.receive(layer_input, grad_output)
        return grad_output, None, None


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
        self._layers: list[tuple[nn.Linear, str | None, str | None]] = []
        for module in model.modules():
            if isinstance(module, nn.Linear):
                weight = names.get(id(module.weight))
                bias = names.get(id(module.bias)) if module.bias is not None else None
                if weight or bias:
                    self._layers.append((module, weight, bias))
        owners = [name for _, *pair in self._layers for name in pair if name]
        # A parameter of two modules would need the sum over both, which only the fallback takes.
        self.covered = {name for name in owners if owners.count(name) == 1}

    @contextmanager
    def reading(
        self, batch_size: int, names: Sequence[str], receive: Callable[[str, torch.Tensor], None]
    ) -> Iterator[set[str]]:
        """While open, every backward calls `receive(name, gradient)` with gradients of shape `(B, *parameter)`.

        Yields the set of parameters whose layer was called with an input that is not one row (or block of rows) per
        example, as in a mixture of experts: what those layers hand over is left out, and the caller has to take their
        gradients in another way.
        """
        wanted, unusable = set(names), set()
        # The graph outlives the hooks: a later backward through it must not hand gradients over again.
        is_open = True

        def hook(weight: str | None, bias: str | None):
            def take(layer_input, grad_output):
                if not is_open:
                    return
                own = [name for name in (weight, bias) if name in wanted]
                if layer_input.dim() < 2 or layer_input.shape[0] != batch_size:
                    unusable.update(own)
                    return
                g = grad_output.reshape(batch_size, -1, grad_output.shape[-1]).float()
                if weight in wanted:
                    x = layer_input.reshape(batch_size, -1, layer_input.shape[-1]).float()
                    receive(weight, torch.bmm(g.transpose(1, 2), x))
                if bias in wanted:
                    receive(bias, g.sum(dim=1))

            def forward_hook(module, inputs, output):
                if not output.requires_grad:
                    return None
                return _Tap.apply(output, inputs[0].detach(), take)

            return forward_hook

        handles = [
            module.register_forward_hook(hook(weight, bias))
            for module, weight, bias in self._layers
            if weight in wanted or bias in wanted
        ]
        try:
            yield unusable
        finally:
            is_open = False
            for handle in handles:
                handle.remove()
