"""Optima of the mixtures that differ from one mixture by a single task, to second order.

A Newton step from the known optimum w of a mixture: with the sum A of the mixture's weighted Hessians at w, the Hessian
of a changed mixture is A plus or minus one task's part, which has the rank of the task's rows. The inverse of A plus
the ridge is thus a preconditioner with which conjugate gradients take a few steps for any number of changes at once.
"""

import torch

from .newton import TaskRows

# Steps of conjugate gradients: the Newton step is then known to a few percent, its effect on losses far better.
_STEPS = 2


def toggled_optima(
    base: list[tuple[TaskRows, torch.Tensor]],
    changed: list[tuple[TaskRows, float]],
    total: float,
    totals: torch.Tensor,
    l2: float,
    new_l2: torch.Tensor,
    w: torch.Tensor,
) -> torch.Tensor:
    """Approximate optima of `C` mixtures, `(C, k)`, float32.

    Args:
        base (`list[tuple[TaskRows, torch.Tensor]]`): rows of the known mixture and their weights, `(n,)` or `(1,)`.
        changed (`list[tuple[TaskRows, float]]`): the task of each change, and its weight, negative where it is removed.
        total (`float`): weighted number of rows of the known mixture.
        totals (`torch.Tensor` of shape `(C,)`): the same of the changed mixtures.
        l2 (`float`): penalty of the known mixture.
        new_l2 (`torch.Tensor` of shape `(C,)`): penalties of the changed mixtures.
        w (`torch.Tensor` of shape `(k,)`): optimum of the known mixture.
    """
    w, totals, new_l2 = w.float(), totals.float().unsqueeze(1), new_l2.float().unsqueeze(1)
    known = w.new_zeros(len(w), len(w))
    for rows, weight in base:
        _, curvature = _derivatives(rows, w)
        known.addmm_(rows.single.T, (weight * curvature).unsqueeze(1) * rows.single)
    ridge = 2 * l2
    # Only a preconditioner: what rounding may take from its smallest eigenvalues is put on top.
    jitter = 1e-6 * float(known.diagonal().mean()) / total
    factor = torch.linalg.cholesky(
        (known / total).double() + (ridge + jitter) * torch.eye(len(w), dtype=torch.float64, device=w.device)
    )
    inverse = torch.cholesky_inverse(factor).float()
    parts, gradient = [], w.new_empty(len(changed), len(w))
    for index, (rows, weight) in enumerate(changed):
        wrong, curvature = _derivatives(rows, w)
        parts.append((rows.single, weight * curvature))
        gradient[index] = -weight * (wrong @ rows.single)
    # At the optimum, the known tasks' gradients add up to minus the penalty's.
    gradient = (gradient - ridge * total * w) / totals + 2 * new_l2 * w

    def product(v: torch.Tensor) -> torch.Tensor:
        own = v @ known
        for index, (x, curvature) in enumerate(parts):
            own[index] += ((x @ v[index]) * curvature) @ x
        return own / totals + 2 * new_l2 * v

    step, residual = torch.zeros_like(gradient), -gradient
    direction = y = residual @ inverse
    rho = (residual * y).sum(1, keepdim=True)
    for _ in range(_STEPS):
        image = product(direction)
        size = rho / (direction * image).sum(1, keepdim=True).clamp(min=1e-30)
        step = step + size * direction
        residual = residual - size * image
        y = residual @ inverse
        rho_next = (residual * y).sum(1, keepdim=True)
        direction = y + rho_next / rho.clamp(min=1e-30) * direction
        rho = rho_next
    return w + step


def _derivatives(rows: TaskRows, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted slope and curvature of every row's loss, `(n,)`."""
    wrong = torch.sigmoid(-(rows.margin.float() + rows.single @ w))
    slope = rows.weighted(wrong)
    return slope, slope * (1 - wrong)
