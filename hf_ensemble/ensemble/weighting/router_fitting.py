"""Fitting a router of prompts to the loss of the mixture that it makes."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize

from ..forward.router import PromptRouter
from .collector import CollectedAnswers

CONSTANT = "constant"
# Of the squared coefficients of features of variance one.
_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_NUM_FOLDS = 5
_MAX_COMPONENTS = 64
_MAX_STEPS = 200


@dataclass(frozen=True)
class RouterFit:
    """A fitted router, and what it was chosen by.

    Args:
        router ([`PromptRouter`]): the router.
        losses (`dict[str, float]`):
            Mean loss over the tasks, in nats, of rows left out, by penalty, and with the same weights for all rows
            (`constant`).
        penalty (`float`, *optional*): that of the router; `None` where constant weights are best.
    """

    router: PromptRouter
    losses: dict[str, float]
    penalty: float | None


def fit_prompt_router(
    answers: Mapping[str, CollectedAnswers], states: Mapping[str, torch.Tensor], combination: str, seed: int = 0
) -> RouterFit:
    """Multinomial regression from hidden states to weights; the tasks count equally.

    The tasks' names play no part: rows that the same adapters answer best get the same weights, whatever their task.
    The states' first principal components, scaled to variance one, are the regression's inputs. Its coefficients
    minimise the loss -log sum_k w_k p_k of the mixture of the adapters' distributions, with a penalty on their squares;
    the penalty, or constant weights, is chosen by the cross-validated loss of the ensemble's own combination.

    Args:
        answers (`dict[str, CollectedAnswers]`): what `m` adapters say of the rows of each task.
        states (`dict[str, torch.Tensor]`): mean hidden states `(rows, H)` of the same rows.
        combination (`str`): `logits`, `log_probs` or `probs`.
        seed (`int`, *optional*, defaults to 0): of the folds.
    """
    stacked = torch.cat([states[task] for task in answers]).double()
    mean = stacked.mean(0)
    _, sizes, axes = torch.linalg.svd(stacked - mean, full_matrices=False)
    count = int(min(_MAX_COMPONENTS, max(1, len(stacked) // 5), (sizes > 1e-6 * sizes[0]).sum().clamp(min=1)))
    scaled = axes[:count].T * (len(stacked) ** 0.5 / sizes[:count].clamp(min=1e-12))
    problem = _Problem.of(answers, (stacked - mean) @ scaled)
    rng = np.random.default_rng(seed)
    # Each fold has its share of every task.
    folds = torch.cat([torch.from_numpy(rng.permutation(found.num_rows) % _NUM_FOLDS) for found in answers.values()])
    tried = {CONSTANT: None} | {str(penalty): penalty for penalty in _PENALTIES}
    losses = {}
    for name, penalty in tried.items():
        weights = torch.zeros(len(stacked), problem.log_probs.shape[0], dtype=torch.float64)
        for fold in folds.unique():
            weights[folds == fold] = problem.weights(problem.fit(folds != fold, penalty))[folds == fold]
        by_task = weights.split([found.num_rows for found in answers.values()])
        losses[name] = float(
            np.mean([found.routed_losses(own, combination).mean() for found, own in zip(answers.values(), by_task)])
        )
    penalty = tried[min(losses, key=losses.get)]
    found = problem.fit(torch.ones(len(stacked), dtype=torch.bool), penalty)
    return RouterFit(PromptRouter(mean.float(), (scaled @ found[:-1]).float(), found[-1].float()), losses, penalty)


@dataclass(frozen=True)
class _Problem:
    """The regression's inputs `(rows, d)`, and the adapters' log-probabilities `(m, tokens)` of the answers."""

    inputs: torch.Tensor
    log_probs: torch.Tensor
    rows: torch.Tensor
    shares: torch.Tensor

    @classmethod
    def of(cls, answers: Mapping[str, CollectedAnswers], inputs: torch.Tensor) -> "_Problem":
        rows, shares, start = [], [], 0
        for own in answers.values():
            rows.append(own.rows + start)
            shares.append(own.token_shares() / len(answers))
            start += own.num_rows
        log_probs = torch.cat([own.log_probs() for own in answers.values()], 1).double()
        return cls(inputs, log_probs, torch.cat(rows), torch.cat(shares))

    def weights(self, coefficients: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.inputs @ coefficients[:-1] + coefficients[-1], 1)

    def fit(self, kept: torch.Tensor, penalty: float | None) -> torch.Tensor:
        """Coefficients `(d + 1, m)` for the rows of a mask; those of the inputs are 0 without a penalty."""
        members, width = len(self.log_probs), self.inputs.shape[1]
        tokens = kept[self.rows]
        log_probs, rows, shares = self.log_probs[:, tokens], self.rows[tokens], self.shares[tokens]
        inputs = self.inputs[:, :0] if penalty is None else self.inputs

        def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
            given = torch.from_numpy(values).view(-1, members).requires_grad_()
            log_weights = torch.log_softmax(inputs @ given[:-1] + given[-1], 1)[rows]
            loss = -(torch.logsumexp(log_weights + log_probs.T, 1) * shares).sum() / shares.sum()
            loss = loss + (penalty or 0.0) * given[:-1].square().sum() / width
            loss.backward()
            return float(loss.detach()), given.grad.flatten().numpy()

        start = np.zeros((inputs.shape[1] + 1) * members)
        found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": _MAX_STEPS})
        given = torch.from_numpy(found.x).view(-1, members)
        return torch.cat([given.new_zeros(width + 1 - len(given), members), given])
