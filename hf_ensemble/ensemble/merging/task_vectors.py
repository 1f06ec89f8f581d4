"""Merging several changes of one weight matrix into one: pure functions on `(out, in)` matrices.

Each takes the adapters' changes and their weights, which usually sum to one. Methods that average over the adapters,
rather than add them up, multiply the weights by `len(deltas)`, so that equal weights give the paper's plain form.
Matrices are merged one by one: pruning and normalisation are over the entries of one matrix.
"""

import hashlib
from collections.abc import Sequence

import torch
from peft.utils import merge_utils

from ..._settings import check_at_least, check_number
from ...errors import EnsembleError
from .low_rank import in_double

Deltas = Sequence[torch.Tensor]


def ties(deltas: Deltas, weights: torch.Tensor, density: float = 0.2) -> torch.Tensor:
    """TIES-Merging ([arXiv 2306.01708](https://arxiv.org/abs/2306.01708)), with PEFT's function.

    The largest `density` of each change is kept; of each entry, those of the sign with the greater sum are averaged.
    """
    _check_density(density)
    return merge_utils.ties(list(deltas), weights * len(deltas), density)


def dare_linear(
    deltas: Deltas, weights: torch.Tensor, module: str, density: float = 0.5, seed: int = 0
) -> torch.Tensor:
    """DARE ([arXiv 2311.03099](https://arxiv.org/abs/2311.03099)): a random `density` of each change is kept, divided
    by `density`, and added up.

    The entries to drop are drawn from the seed and the module's name, so modules of one shape drop different ones, and
    a module drops the same ones on every device.
    """
    return sum(w * delta for w, delta in zip(weights, _thinned(deltas, module, density, seed)))


def dare_ties(deltas: Deltas, weights: torch.Tensor, module: str, density: float = 0.5, seed: int = 0) -> torch.Tensor:
    """DARE's random pruning, then TIES' election of signs, by peft's functions."""
    kept = torch.stack(_thinned(deltas, module, density, seed))
    elected = merge_utils.calculate_majority_sign_mask(kept)
    scaled = merge_utils.reshape_weight_task_tensors(kept, weights * len(deltas))
    return merge_utils.disjoint_merge(kept * scaled, elected)


def breadcrumbs(
    deltas: Deltas, weights: torch.Tensor, drop_smallest: float = 0.85, drop_largest: float = 0.01
) -> torch.Tensor:
    """Model Breadcrumbs ([arXiv 2312.06795](https://arxiv.org/abs/2312.06795)): of each change the smallest and the
    very largest entries are dropped, the rest is added up."""
    for name, share in (("drop_smallest", drop_smallest), ("drop_largest", drop_largest)):
        check_number(name, share, 0, 1, error=EnsembleError)
    return sum(w * delta * _middle(delta.abs(), drop_smallest, drop_largest) for w, delta in zip(weights, deltas))


def pcb(deltas: Deltas, weights: torch.Tensor, density: float = 0.1) -> torch.Tensor:
    """PCB-Merging ([arXiv 2410.02396](https://arxiv.org/abs/2410.02396)): each entry is the mean of the
    adapters', weighted by its importance within its adapter and its agreement with the others.

    With t_i the flattened changes, clipped at their 0.01 % tails: b_i = exp(m n(|t_i|)^2) tanh(t_i sum_j t_j), where n
    scales to [0, 1]; the largest `density` of b_i, scaled to [0, 1], are the weights.
    """
    _check_density(density)
    flat = torch.stack([delta.reshape(-1) for delta in deltas])
    magnitude = _clip(flat.abs(), 1e-4, 1 - 1e-4)
    within = torch.exp(len(flat) * _to_unit_interval(magnitude) ** 2)
    balance = within * torch.tanh(flat * flat.sum(0))
    balance = _to_unit_interval(_clip(balance, 1 - density, 1.0))
    merged = (balance * (weights * len(flat))[:, None] * flat.sign() * magnitude).sum(0)
    return (merged / balance.sum(0).clamp(min=1e-12)).view_as(deltas[0])


def tsv(deltas: Deltas, weights: torch.Tensor) -> torch.Tensor:
    """TSV-Merge ([arXiv 2412.00081](https://arxiv.org/abs/2412.00081)): of each change the largest singular directions
    are kept, as many as fit beside those of the others, made orthogonal to theirs, and added up.

    With the changes' singular vectors side by side in U and V, the result is P(U) S P(V)^T, where P(M) is the
    orthogonal factor of M. Weights multiply the singular values.
    """
    kept = max(1, min(deltas[0].shape) // len(deltas))
    left, values, right = [], [], []
    for weight, delta in zip(weights * len(deltas), deltas):
        u, s, vt = torch.linalg.svd(in_double(delta), full_matrices=False)
        size = min(kept, max(int((s > s[0] * 1e-6).sum()), 1))
        left.append(u[:, :size])
        values.append(in_double(weight) * s[:size])
        right.append(vt[:size].T)
    merged = _orthogonal(torch.cat(left, 1)) * torch.cat(values) @ _orthogonal(torch.cat(right, 1)).T
    return merged.to(deltas[0].dtype).to(deltas[0].device)


def knots(deltas: Deltas, weights: torch.Tensor, density: float = 0.2) -> torch.Tensor:
    """KnOTS with TIES ([arXiv 2410.19735](https://arxiv.org/abs/2410.19735)): the changes are brought into one basis,
    in which TIES merges them.

    The basis U is that of the singular vectors of the changes side by side; each change is U (U^T D), of which TIES
    merges the second factors.
    """
    doubled = map(in_double, deltas)
    values, basis = torch.linalg.eigh(sum(delta @ delta.T for delta in doubled))
    basis = basis[:, values > values.max() * 1e-12].to(deltas[0].dtype).to(deltas[0].device)
    return basis @ ties([basis.T @ delta for delta in deltas], weights, density)


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The closest matrix with orthonormal columns."""
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def lines_factor(layer: int | None, num_layers: int, alpha: float, beta: float) -> float:
    """LiNeS ([arXiv 2410.17146](https://arxiv.org/abs/2410.17146)): alpha + beta (layer - 1) / (layers - 1), layers
    counted from 1 here and from 0 in the argument; `alpha` outside of the layers."""
    for name, value in (("alpha", alpha), ("beta", beta)):
        check_number(name, value, error=EnsembleError)
    return alpha if layer is None else alpha + beta * layer / max(num_layers - 1, 1)


def _check_density(density: float) -> None:
    check_number("density", density, 0, 1, above=True, error=EnsembleError)


def _thinned(deltas: Deltas, module: str, density: float, seed: int) -> list[torch.Tensor]:
    """Each change with a random `density` of its entries, divided by `density`."""
    _check_density(density)
    check_at_least("seed", seed, 0, error=EnsembleError)
    digest = hashlib.blake2b(f"{seed}|{module}".encode(), digest_size=8).digest()
    # A generator of its own leaves the global ones alone, which torch.manual_seed would reset on every device.
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    masks = [torch.rand(delta.shape, generator=generator) < density for delta in deltas]
    return [delta * mask.to(delta.device) / density for delta, mask in zip(deltas, masks)]


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
