"""Conjugate gradients for the Hessians of many mixtures at once."""

import torch

# One task's part of the Hessians: its rows' curvature `(s, n)` under `s` mixtures, the indices `(s,)` of the mixtures,
# and its rows' features `(n, k)`.
Term = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def conjugate_gradient(
    terms: list[Term],
    diagonal: torch.Tensor,
    ridge: torch.Tensor,
    right_side: torch.Tensor,
    target: torch.Tensor,
    max_iterations: int = 250,
) -> torch.Tensor:
    """Solve (sum over tasks of X^T diag(c) X + ridge) v = right side for each of `S` mixtures.

    Preconditioned conjugate gradients (Hestenes and Stiefel 1952) in the precision of the arguments.

    Args:
        terms (`list[Term]`): curvature, mixtures and features of every task; a term contains each mixture once.
        diagonal (`torch.Tensor` of shape `(S, k)`): approximate diagonals of the Hessians, the preconditioner.
        ridge (`torch.Tensor` of shape `(S, 1)`): multiple of the identity in every Hessian.
        right_side (`torch.Tensor` of shape `(S, k)`): right sides.
        target (`torch.Tensor` of shape `(S,)`): target norm of the residual.
        max_iterations (`int`, *optional*, defaults to 250): maximum number of matrix products.

    Returns:
        `torch.Tensor`: v, `(S, k)`.
    """
    solution = torch.zeros_like(right_side)
    left = torch.arange(len(solution), device=solution.device)
    v, residual = torch.zeros_like(solution), right_side
    direction = y = residual / diagonal
    rho = (residual * y).sum(1)
    for _ in range(max_iterations):
        active = residual.norm(dim=1) > target
        if not active.any():
            break
        if active.sum() <= len(active) / 2:
            # Drop the mixtures that have converged.
            solution[left] = v
            terms = [_restricted(term, active) for term in terms]
            left, v, residual, direction, rho = (a[active] for a in (left, v, residual, direction, rho))
            diagonal, ridge, target, active = (a[active] for a in (diagonal, ridge, target, active))
        product = ridge * direction
        for curvature, mixtures, x in terms:
            product.index_add_(0, mixtures, (direction[mixtures] @ x.T).mul_(curvature) @ x)
        step = torch.where(active, rho / (direction * product).sum(1), 0.0).unsqueeze(1)
        v = v + step * direction
        residual = residual - step * product
        y = residual / diagonal
        rho_next = (residual * y).sum(1)
        direction = y + torch.where(active, rho_next / rho, 0.0).unsqueeze(1) * direction
        rho = rho_next
    solution[left] = v
    return solution


def _restricted(term: Term, kept: torch.Tensor) -> Term:
    """A term with only the mixtures in the mask `kept` `(S,)`, renumbered."""
    curvature, mixtures, x = term
    own = kept[mixtures]
    return curvature[own], (torch.cumsum(kept, 0) - 1)[mixtures[own]], x
