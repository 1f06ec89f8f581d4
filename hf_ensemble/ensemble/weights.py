"""How much each adapter counts for a task: a convex problem on cached logits."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize


@dataclass(frozen=True)
class FittedWeights:
    """Weights `(m,)` on the simplex, and the mean example loss that they reach on the data they were fitted to."""

    weights: np.ndarray
    loss: float


def mixed_loss(logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean over examples of the mean token loss of the weighted logits.

    Args:
        logits (`torch.Tensor` of shape `(m, n, V)`): logits of each adapter at the answer tokens.
        targets (`torch.Tensor` of shape `(n,)`): the answer tokens.
        rows (`torch.Tensor` of shape `(n,)`): the example each token belongs to, from 0 on.
        weights (`torch.Tensor` of shape `(m,)`): weight of each adapter.
    """
    combined = torch.einsum("m,mnv->nv", weights.to(logits.dtype), logits.nan_to_num(neginf=-1e30))
    losses = torch.nn.functional.cross_entropy(combined.double(), targets, reduction="none")
    num_examples = int(rows.max()) + 1
    per_example = torch.zeros(num_examples, dtype=losses.dtype).index_add(0, rows, losses)
    return (per_example / torch.bincount(rows, minlength=num_examples)).mean()


def fit_weights(logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor) -> FittedWeights:
    """Weights on the simplex with the least loss; shapes as in [`mixed_loss`].

    The loss is convex in the weights, so the optimum is no worse than equal weights or any single adapter.
    """
    members = len(logits)

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.tensor(w, dtype=torch.float64, requires_grad=True)
        loss = mixed_loss(logits, targets, rows, weights)
        (gradient,) = torch.autograd.grad(loss, weights)
        return loss.item(), gradient.numpy().astype(np.float64)

    starts = [np.full(members, 1.0 / members), *np.eye(members)]
    start = min(starts, key=lambda w: objective(w)[0])
    result = minimize(
        objective,
        start,
        jac=True,
        bounds=[(0.0, 1.0)] * members,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1.0, "jac": lambda w: np.ones(members)},
        method="SLSQP",
        options={"maxiter": 200, "ftol": 1e-10},
    )
    weights = np.clip(result.x, 0.0, 1.0)
    # An adapter below a twentieth changes little but costs its forward pass.
    weights[weights < 0.05] = 0.0
    weights /= weights.sum()
    candidates = [weights, start]
    losses = [objective(w)[0] for w in candidates]
    best = int(np.argmin(losses))
    return FittedWeights(candidates[best], losses[best])
