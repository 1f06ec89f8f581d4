"""The surrogate: fine-tuning on a mixture of tasks, to first order, for many mixtures at once.

For a mixture a over tasks (GradEx, arXiv 2409.19458, equation 4, with weights instead of a subset):

    w(a) = argmin_w  sum_k a_k sum_{i in k} log(1 + exp(-(m_i + x_i.w))) / sum_k a_k n_k  +  l2(a) |w|^2
"""

from dataclasses import dataclass

import numpy as np
import torch

from ..errors import EstimationError

# Rows times mixtures that are held at once, in float64 (a handful of such arrays are alive).
_CHUNK = 16_000_000


@dataclass(frozen=True)
class SurrogateSolution:
    """Optima of `S` mixtures.

    Args:
        coefficients (`np.ndarray` of shape `(S, k)`): w of each mixture.
        gradient_norm (`np.ndarray` of shape `(S,)`): norm of the objective's gradient there.
    """

    coefficients: np.ndarray
    gradient_norm: np.ndarray


def solve_surrogate(
    features: np.ndarray,
    margin: np.ndarray,
    task: np.ndarray,
    mixtures: np.ndarray,
    l2: np.ndarray,
    tolerance: float = 1e-8,
    max_iterations: int = 50,
) -> SurrogateSolution:
    """Solve the surrogate of every mixture by Newton's method with conjugate gradients.

    The mixtures share every matrix product with the features; their Hessians are never formed.

    Args:
        features (`np.ndarray` of shape `(n, k)`): training features.
        margin (`np.ndarray` of shape `(n,)`): margins at the linearisation point.
        task (`np.ndarray` of shape `(n,)`): index of each row's task.
        mixtures (`np.ndarray` of shape `(S, T)`): weight of one row of each task; 0 and 1 for subsets.
        l2 (`np.ndarray` of shape `(S,)`): ridge penalty of each mixture.
        tolerance (`float`, *optional*, defaults to 1e-8): gradient norm to reach.
        max_iterations (`int`, *optional*, defaults to 50): Newton steps.

    Raises:
        `EstimationError`: for an empty mixture, negative or non-finite values, or when the tolerance is not reached.
    """
    mixtures = np.asarray(mixtures, dtype=np.float64)
    l2 = np.broadcast_to(np.asarray(l2, dtype=np.float64), len(mixtures))
    _check(features, margin, mixtures, l2)
    counts = np.bincount(task, minlength=mixtures.shape[1])
    totals = mixtures @ counts
    if (totals == 0).any():
        raise EstimationError(f"Mixture {int(np.argmin(totals))} is empty: no training row has a weight.")
    chunk = max(1, _CHUNK // max(1, len(margin)))
    parts = []
    for start in range(0, len(mixtures), chunk):
        part = slice(start, start + chunk)
        # Rows that no mixture of the chunk weighs cost nothing.
        used = np.flatnonzero((mixtures[part] > 0).any(axis=0)[task])
        row_weights = (mixtures[part] / totals[part, None])[:, task[used]]
        parts.append(_newton(features[used], margin[used], row_weights, l2[part], tolerance, max_iterations))
    return SurrogateSolution(*(np.concatenate(arrays) for arrays in zip(*parts)))


def _check(features, margin, mixtures, l2) -> None:
    for name, array in (("features", features), ("margins", margin), ("mixtures", mixtures), ("l2", l2)):
        if not np.isfinite(array).all():
            raise EstimationError(f"The {name} hold a value that is not finite.")
    if (mixtures < 0).any():
        raise EstimationError(f"Mixture {int(np.argmax((mixtures < 0).any(axis=1)))} has a negative weight.")
    if (l2 <= 0).any():
        raise EstimationError("l2 has to be positive: the surrogate has no minimum without it.")


def _newton(features, margin, row_weights, l2, tolerance, max_iterations):
    x = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float64))
    m = torch.from_numpy(np.asarray(margin, dtype=np.float64))
    b = torch.from_numpy(row_weights)
    ridge = 2 * torch.from_numpy(np.array(l2)).unsqueeze(1)
    w = torch.zeros(len(b), x.shape[1], dtype=torch.float64)

    def objective(z, w):
        return (b * torch.nn.functional.softplus(-z)).sum(1) + 0.5 * (ridge * w * w).sum(1)

    z = m.expand(len(b), -1)
    value = objective(z, w)
    for _ in range(max_iterations):
        gradient = ridge * w - (b * torch.sigmoid(-z)) @ x
        norm = gradient.norm(dim=1)
        if (norm <= tolerance).all():
            break
        curvature = b * torch.sigmoid(z) * torch.sigmoid(-z)
        step = -_conjugate_gradient(x, curvature, ridge, gradient, norm)
        z_step = step @ x.T
        slope = (gradient * step).sum(1)
        size = torch.ones(len(b), 1, dtype=torch.float64)
        for _ in range(40):
            trial_z, trial_w = z + size * z_step, w + size * step
            trial = objective(trial_z, trial_w)
            # At the optimum two values differ by rounding alone.
            worse = trial > value + 1e-4 * size[:, 0] * slope + 1e-15 * value.abs() + 1e-18
            if not worse.any():
                break
            size = torch.where(worse.unsqueeze(1), size / 2, size)
        z, w, value = trial_z, trial_w, trial
    else:
        raise EstimationError(
            f"The surrogate did not reach the gradient norm {tolerance} in {max_iterations} steps (found "
            f"{float(norm.max()):.2g}). Its l2 may be too small for these features."
        )
    return w.numpy(), norm.numpy()


def _conjugate_gradient(x, curvature, ridge, gradient, norm, max_iterations=250):
    """Solve (X^T diag(c) X + ridge) v = gradient for every mixture, to a share of its own gradient."""
    # Jacobi preconditioner: principal components make the Hessian nearly diagonal.
    inverse_diagonal = 1.0 / (curvature @ (x * x) + ridge)
    # Accuracy in step with the outer iteration gives Newton's fast convergence (Dembo et al. 1982).
    target = torch.minimum(torch.full_like(norm, 0.1), norm.sqrt()) * norm
    v = torch.zeros_like(gradient)
    residual = gradient.clone()
    y = inverse_diagonal * residual
    direction = y.clone()
    rho = (residual * y).sum(1)
    for _ in range(max_iterations):
        active = residual.norm(dim=1) > target
        if not active.any():
            break
        product = (curvature * (direction @ x.T)) @ x + ridge * direction
        step = torch.where(active, rho / (direction * product).sum(1).clamp(min=1e-300), torch.zeros_like(rho))
        v += step.unsqueeze(1) * direction
        residual -= step.unsqueeze(1) * product
        y = inverse_diagonal * residual
        rho_next = (residual * y).sum(1)
        direction = (
            y + torch.where(active, rho_next / rho.clamp(min=1e-300), torch.zeros_like(rho)).unsqueeze(1) * direction
        )
        rho = rho_next
    return v
