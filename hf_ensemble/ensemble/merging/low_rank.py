"""Matrices as products of two thin ones: exact, or truncated to a rank, with the error."""

import torch


def in_double(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float64; on the CPU where its own device, such as Apple's MPS, has none."""
    try:
        tensor.new_zeros(1).double()
    except (RuntimeError, TypeError):
        tensor = tensor.cpu()
    return tensor.double()


def truncated(down: torch.Tensor, up: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """The best approximation of `up @ down` by a product of rank `rank`.

    Args:
        down (`torch.Tensor` of shape `(R, in)`): right factor.
        up (`torch.Tensor` of shape `(out, R)`): left factor.
        rank (`int`): largest rank of the result.

    Returns:
        `tuple`: factors `(rank, in)` and `(out, rank)`, squared Frobenius norm of the error, and of the product.
    """
    # Orthogonal bases of both factors leave a small core, whose singular values are the product's.
    left, left_core = torch.linalg.qr(in_double(up))
    right, right_core = torch.linalg.qr(in_double(down).T)
    u, s, vt = torch.linalg.svd(left_core @ right_core.T)
    return _cut(left @ u, s, vt @ right.T, rank, down.device)


def truncated_matrix(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """[`truncated`] for a matrix without factors."""
    return _cut(*torch.linalg.svd(in_double(matrix), full_matrices=False), rank, matrix.device)


def _cut(u: torch.Tensor, s: torch.Tensor, vt: torch.Tensor, rank: int, device: torch.device):
    root = s[:rank].sqrt()
    down, up = (root[:, None] * vt[:rank]).float(), (u[:, :rank] * root).float()
    return down.to(device), up.to(device), float((s[rank:] ** 2).sum()), float((s**2).sum())


def padded(down: torch.Tensor, up: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with `rank` inner dimensions, the new ones zero."""
    missing = rank - len(down)
    if not missing:
        return down, up
    return torch.nn.functional.pad(down, (0, 0, 0, missing)), torch.nn.functional.pad(up, (0, missing))
