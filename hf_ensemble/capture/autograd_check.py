"""Checks the hooks' per-example gradients of a batch against autograd."""

import torch
from torch import nn

# Tolerances of weighted sums, relative to the norm of the summands. Both sides add the same numbers in another order:
# the error is about 1e-6 in float32 (1e-3 with TF32) and 1e-2 in bfloat16, and about 1 for gradients of other rows.
_FLOAT32, _LOWER_PRECISION = 5e-3, 0.05


class Agreement:
    """Compares the hooks' gradients, summed with a different weight for each example, with autograd's.

    With equal weights, a layer that sees the examples in another order would pass.

    Args:
        batch_size (`int`): number of examples `B`.
    """

    def __init__(self, batch_size: int):
        index = torch.arange(batch_size, dtype=torch.float64)
        # Alternating signs, and distinct magnitudes from 0.5 to 1.5 that differ strongly between neighbors.
        weights = (0.5 + (index * 0.6180339887498949) % 1) * (1 - 2 * (index % 2))
        self.weights = weights.float()
        self._sums: dict[str, torch.Tensor] = {}
        self._squares: dict[str, torch.Tensor] = {}

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the examples' values `(B,)`; its gradient is what the hooks' weighted sums should be."""
        # With a model spread over devices, outputs may be on another device than inputs.
        return (self.weights.to(values.device) * values).sum()

    def add(self, name: str, gradient: torch.Tensor) -> None:
        """Add the gradients `(B, *shape)` from a hook."""
        weights = self.weights.to(gradient.device)
        flat = gradient.flatten(start_dim=1)
        self._sums[name] = self._sums.get(name, 0) + (weights @ flat).view(gradient.shape[1:])
        self._squares[name] = self._squares.get(name, 0) + weights.square() @ flat.square().sum(dim=1)

    def verdict(self, name: str, total: torch.Tensor | None, tolerance: float) -> bool | None:
        """Whether the sum equals autograd's `total` (`None` if unused); `None` if neither exists or is finite."""
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
    """Tolerance for the precision that the model computes in; integer parameters are quantized weights."""
    low = any(not parameter.is_floating_point() or parameter.itemsize < 4 for parameter in model.parameters())
    return _LOWER_PRECISION if low or torch.is_autocast_enabled(device.type) else _FLOAT32
