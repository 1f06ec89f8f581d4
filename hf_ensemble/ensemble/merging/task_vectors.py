"""Merging several changes of one weight matrix into one: pure functions on `(out, in)` matrices.

Each takes the adapters' changes and their weights, which usually sum to one. Methods that average over the adapters,
rather than add them up, multiply the weights by `len(deltas)`, so that equal weights give the paper's plain form.
Matrices are merged one by one: pruning and normalisation are over the entries of one matrix.
"""

from collections.abc import Sequence

import torch
from peft.utils import merge_utils

Deltas = Sequence[torch.Tensor]


def ties(deltas: Deltas, weights: torch.Tensor, density: float = 0.2) -> torch.Tensor:
    """TIES-Merging ([arXiv 2306.01708](https://arxiv.org/abs/2306.01708)), with PEFT's function.

    The largest `density` of each change is kept; of each entry, those of the sign with the greater sum are averaged.
    """
    return merge_utils.ties(list(deltas), weights * len(deltas), density)


def dare_linear(deltas: Deltas, weights: torch.Tensor, density: float = 0.5, seed: int = 0) -> torch.Tensor:
    """DARE ([arXiv 2311.03099](https://arxiv.org/abs/2311.03099)), with PEFT's function: a random `density` of each
    change is kept, divided by `density`, and added up."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return merge_utils.dare_linear(list(deltas), weights, density)


def dare_ties(deltas: Deltas, weights: torch.Tensor, density: float = 0.5, seed: int = 0) -> torch.Tensor:
    """DARE's random pruning, then TIES' election of signs, with PEFT's function."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return merge_utils.dare_ties(list(deltas), weights * len(deltas), density)


def breadcrumbs(
    deltas: Deltas, weights: torch.Tensor, drop_smallest: float = 0.85, drop_largest: float = 0.01
) -> torch.Tensor:
    """Model Breadcrumbs ([arXiv 2312.06795](https://arxiv.org/abs/2312.06795)): of each change the smallest and the
    very largest entries are dropped, the rest is added up."""
    return sum(w * delta * _middle(delta.abs(), drop_smallest, drop_largest) for w, delta in zip(weights, deltas))


def pcb(deltas: Deltas, weights: torch.Tensor, density: float = 0.1) -> torch.Tensor:
    """PCB-Merging ([arXiv 2410.02396](https://arxiv.org/abs/2410.02396)): each entry is the mean of the
    adapters', weighted by its importance within its adapter and its agreement with the others.

    With t_i the flattened changes, clipped at their 0.01 % tails: b_i = exp(m n(|t_i|)^2) tanh(t_i sum_j t_j), where n
    scales to [0, 1]; the largest `density` of b_i, scaled to [0, 1], are the weights.
    """
    flat = torch.stack([delta.reshape(-1) for delta in deltas])
    magnitude = _clip(flat.abs(), 1e-4, 1 - 1e-4)
    within = torch.exp(len(flat) * _to_unit_interval(magnitude) ** 2)
    balance = within * torch.tanh(flat * flat.sum(0))
    balance = _to_unit_interval(_clip(balance, 1 - density, 1.0))
    merged = (balance * (weights * len(flat))[:, None] * flat.sign() * magnitude).sum(0)
    return (merged / balance.sum(0).clamp(min=1e-12)).view_as(deltas[0])


def lines_factor(layer: int | None, num_layers: int, alpha: float, beta: float) -> float:
    """LiNeS ([arXiv 2410.17146](https://arxiv.org/abs/2410.17146)): alpha + beta (layer - 1) / (layers - 1), layers
    counted from 1 here and from 0 in the argument; `alpha` outside of the layers."""
    return alpha if layer is None else alpha + beta * layer / max(num_layers - 1, 1)


def _middle(magnitude: torch.Tensor, below: float, above: float) -> torch.Tensor:
    order = magnitude.reshape(-1).argsort()
    mask = torch.zeros(order.numel(), dtype=magnitude.dtype, device=magnitude.device)
    mask[order[int(below * order.numel()) : order.numel() - int(above * order.numel())]] = 1.0
    return mask.view_as(magnitude)


def _clip(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Rows of `values` between two of their quantiles."""
    count = values.shape[1]
    ordered = values.sort(1).values
    last = max(int(high * count) - 1, 0)
    return values.clamp(ordered[:, min(int(low * count), last), None], ordered[:, last, None])


def _to_unit_interval(values: torch.Tensor) -> torch.Tensor:
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    return (values - low) / (high - low).clamp(min=1e-30)
