"""Whether the hooks' gradients of a batch are autograd's, example by example."""

import torch
from torch import nn

# How far weighted sums may lie apart, relative to the norm of what was summed. Both add the same numbers in another
# order: float32 leaves about 1e-6 (TF32 1e-3), bfloat16 about 1e-2; gradients of other rows are off by about 1.
_FLOAT32, _LOWER_PRECISION = 5e-3, 0.05


class Agreement:
    """Sums of the hooks' gradients, each example weighted by another number, next to autograd's own.

    Without the weights a layer that sees the examples in another order would agree.

    Args:
        batch_size (`int`): examples `B`.
    """

    def __init__(self, batch_size: int):
        index = torch.arange(batch_size, dtype=torch.float64)
        # Alternating signs, and sizes from 0.5 to 1.5 of which neighbours differ much and no two are equal.
        weights = (0.5 + (index * 0.6180339887498949) % 1) * (1 - 2 * (index % 2))
        self.weights = weights.float()
        self._sums: dict[str, torch.Tensor] = {}
        self._squares: dict[str, torch.Tensor] = {}

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the examples' values `(B,)`, whose gradient the hooks' weighted sums have to be."""
        # A model over several devices may answer on another one than it is asked on.
        return (self.weights.to(values.device) * values).sum()

    def add(self, name: str, gradient: torch.Tensor) -> None:
        """Add a hook's gradients `(B, *shape)`."""
        weights = self.weights.to(gradient.device)
        flat = gradient.flatten(start_dim=1)
        self._sums[name] = self._sums.get(name, 0) + (weights @ flat).view(gradient.shape[1:])
        self._squares[name] = self._squares.get(name, 0) + weights.square() @ flat.square().sum(dim=1)

    def verdict(self, name: str, total: torch.Tensor | None, tolerance: float) -> bool | None:
        """Whether the sum is autograd's `total` (`None`: not reached); `None` where neither is there or finite."""
        own = self._sums.get(name)
        if own is None and total is None:
            return None
        if own is None or total is None:
            return False
        error, size = (own - total.to(own)).norm(), self._squares[name].sqrt()
        if not torch.isfinite(error + size):
            return None
        return bool(error <= tolerance * size + 1e-8)


def tolerance(model: nn.Module, device: torch.device) -> float:
    """For the precision that the model computes in: integers are quantized weights."""
    low = any(not parameter.is_floating_point() or parameter.itemsize < 4 for parameter in model.parameters())
    return _LOWER_PRECISION if low or torch.is_autocast_enabled(device.type) else _FLOAT32
