"""The weights of a task's adapters as a convex problem on their logits."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..._settings import check_one_of
from ...errors import EnsembleError
from ...tasks import token_scores
from .convex import CONSTRAINTS, minimize_convex

# Entries of the logits that are converted to float64 at a time.
_CHUNK_VALUES = 2**23

Objective = Callable[[np.ndarray], tuple[float, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class FittedWeights:
    """Weights, and the mean example loss, in nats, that they reach on the data they were fitted to.

    Args:
        weights (`np.ndarray` of shape `(m,)`): weight of each adapter.
        loss (`float`): loss with these weights.
        gap (`float`):
            Bound on how far the loss, without the scale, is above that of the best weights of the constraint.
        uniform_loss (`float`): loss with equal weights.
        one_hot_losses (`np.ndarray` of shape `(m,)`): loss of each adapter alone.
        constraint (`str`): `simplex`, `nonnegative` or `unconstrained`.
        scale (`float`): what the combined logits are multiplied by; the losses of other weights are without it.
        validation ([`CrossValidation`], *optional*): what the weights were chosen by, unless they are the optimum.
    """

    weights: np.ndarray
    loss: float
    gap: float = 0.0
    uniform_loss: float = float("nan")
    one_hot_losses: np.ndarray = field(default_factory=lambda: np.zeros(0))
    constraint: str = "simplex"
    scale: float = 1.0
    validation: "CrossValidation | None" = None


@dataclass(frozen=True)
class CrossValidation:
    """Losses, in nats, of rows that the weights were not fitted to.

    Args:
        losses (`dict[str, float]`):
            Mean loss of each candidate with its scale, of the `chosen` weights and, where these have a scale, of the
            same without it (`unscaled`). Candidates are `uniform`, each adapter alone (`adapter NAME`), the task's
            `own` adapters, `fitted`, and the fitted weights shrunk towards one of the former (`fitted, 0.25 best`).
        shares (`dict[str, float]`): share of each candidate in the chosen weights.
    """

    losses: dict[str, float]
    shares: dict[str, float]


def check_constraint(constraint: str, combination: str) -> None:
    """Raise `EnsembleError` for an unknown constraint, or one that the combination does not allow."""
    check_one_of("constraint", constraint, CONSTRAINTS, EnsembleError)
    if combination == "probs" and constraint != "simplex":
        raise EnsembleError("Weights of the combination 'probs' are shares: expected constraint='simplex'.")


def mixed_loss(logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean over examples of the mean token loss of the weighted logits.

    Args:
        logits (`torch.Tensor` of shape `(m, n, V)`): logits of each adapter at the answer tokens.
        targets (`torch.Tensor` of shape `(n,)`): the answer tokens.
        rows (`torch.Tensor` of shape `(n,)`): the example each token belongs to, from 0 on.
        weights (`torch.Tensor` of shape `(m,)`): weight of each adapter.
    """
    impossible = logits.isneginf().any(0)
    combined = torch.einsum("m,mnv->nv", weights.to(logits.dtype), logits.masked_fill(impossible, 0.0))
    combined = combined.double().masked_fill(impossible, float("-inf"))
    losses = torch.nn.functional.cross_entropy(combined, targets, reduction="none")
    return (losses * token_shares(rows)).sum()


def token_shares(rows: torch.Tensor) -> torch.Tensor:
    """What each token's loss counts in the mean over examples of the mean over their tokens, `(n,)`."""
    counts = torch.bincount(rows)
    return 1.0 / (counts[rows].double() * int((counts > 0).sum()))


def logits_objective(
    logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor | None = None
) -> Objective:
    """Value, gradient and Hessian of [`mixed_loss`] in the weights, in float64.

    With `tokens`, `(n,)`, the targets and rows are those of some of the logits' tokens.
    """
    shares = token_shares(rows)
    members = len(logits)

    def objective(w: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        weights = torch.tensor(w, dtype=torch.float64)
        value, gradient, hessian = 0.0, torch.zeros(members).double(), torch.zeros(members, members).double()
        for part, own in _chunks(logits, len(targets), tokens):
            share, target = shares[part], targets[part]
            impossible = own.isneginf().any(0)
            own = own.masked_fill(impossible, 0.0)
            combined = torch.einsum("m,mnv->nv", weights, own).masked_fill(impossible, float("-inf"))
            log_probs = torch.log_softmax(combined, -1)
            probs = log_probs.exp()
            at_target = target[:, None]
            value += float(-(log_probs.gather(1, at_target).squeeze(1) * share).sum())
            mean = torch.einsum("nv,mnv->mn", probs, own)
            hit = own.gather(2, at_target.expand(members, -1, 1)).squeeze(2)
            gradient += ((mean - hit) * share).sum(1)
            second = torch.einsum("knv,jnv->kj", own * (probs * share[:, None]), own)
            hessian += second - (mean * share) @ mean.T
        return value, gradient.numpy(), hessian.numpy()

    return objective


def logits_losses(
    logits: torch.Tensor,
    targets: torch.Tensor,
    rows: torch.Tensor,
    weights: np.ndarray,
    tokens: torch.Tensor | None = None,
) -> np.ndarray:
    """Loss of each example, `(J, examples)`, under each of J sets of weights `(J, m)`; see [`logits_objective`]."""
    mixes = torch.tensor(weights, dtype=torch.float64)
    losses = torch.empty(len(mixes), len(targets), dtype=torch.float64)
    for part, own in _chunks(logits, len(targets), tokens):
        impossible = own.isneginf().any(0)
        own = own.masked_fill(impossible, 0.0)
        for mix, row in zip(mixes, losses):
            combined = torch.einsum("m,mnv->nv", mix, own).masked_fill(impossible, float("-inf"))
            row[part] = torch.nn.functional.cross_entropy(combined, targets[part], reduction="none")
    return example_means(losses, rows)


def routed_losses(
    logits: torch.Tensor,
    targets: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    tokens: torch.Tensor | None = None,
) -> np.ndarray:
    """Loss of each example, `(examples,)`, with weights of its own, `(examples, m)`; see [`logits_objective`]."""
    losses = torch.empty(len(targets), dtype=torch.float64)
    for part, own in _chunks(logits, len(targets), tokens):
        impossible = own.isneginf().any(0)
        combined = torch.einsum("nm,mnv->nv", weights[rows[part]].double(), own.masked_fill(impossible, 0.0))
        combined = combined.masked_fill(impossible, float("-inf"))
        losses[part] = torch.nn.functional.cross_entropy(combined, targets[part], reduction="none")
    return example_means(losses[None], rows)[0]


def _chunks(logits: torch.Tensor, count: int, tokens: torch.Tensor | None) -> Iterator[tuple[slice, torch.Tensor]]:
    """Consecutive tokens, and their logits in float64, a few at a time."""
    step = max(1, _CHUNK_VALUES // (logits.shape[0] * logits.shape[2]))
    for start in range(0, count, step):
        part = slice(start, start + step)
        yield part, logits[:, part if tokens is None else tokens[part]].double()


def probs_losses(log_probs: torch.Tensor, rows: torch.Tensor, weights: np.ndarray) -> np.ndarray:
    """The same for the mean of the adapters' distributions, from log-probabilities `(m, n)` of the answer tokens."""
    shares = torch.tensor(weights, dtype=torch.float64)
    return example_means(-torch.logsumexp(shares.log().unsqueeze(-1) + log_probs.double(), 1), rows)


def example_means(losses: torch.Tensor, rows: torch.Tensor) -> np.ndarray:
    """Mean over each example's tokens, `(J, examples)`, of losses `(J, n)`."""
    counts = torch.bincount(rows)
    return (torch.zeros(len(losses), len(counts)).double().index_add_(1, rows, losses) / counts).numpy()


def probs_objective(log_probs: torch.Tensor, rows: torch.Tensor) -> Objective:
    """The same for the mean of the adapters' distributions.

    Args:
        log_probs (`torch.Tensor` of shape `(m, n)`): log-probability of each answer token under each adapter.
        rows (`torch.Tensor` of shape `(n,)`): the example each token belongs to, from 0 on.
    """
    shares, log_probs = token_shares(rows).numpy(), log_probs.double()
    highest = log_probs.amax(0)
    # Of each token in units of the best adapter's probability, so that none underflows.
    relative, highest = (log_probs - highest).exp().numpy(), highest.numpy()

    def objective(w: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        mixed = w @ relative
        ratio = relative / mixed
        value = float(-((np.log(mixed) + highest) * shares).sum())
        return value, -(ratio * shares).sum(1), (ratio * shares) @ ratio.T

    return objective


def fit_weights(
    logits: torch.Tensor,
    targets: torch.Tensor,
    rows: torch.Tensor,
    constraint: str = "simplex",
    combination: str = "logits",
    min_weight: float = 0.0,
) -> FittedWeights:
    """Weights with the least loss; shapes as in [`mixed_loss`].

    The loss is convex in the weights, so the optimum is no worse than equal weights or any single adapter.

    Args:
        constraint (`str`): see [`fit_objective`].
        combination (`str`): `logits` (or `log_probs`, whose loss is the same) or `probs`.
        min_weight (`float`): lighter adapters are left out, see [`fit_objective`].
    """
    if combination == "probs":
        objective = probs_objective(torch.stack([token_scores(own, targets)[0] for own in logits]), rows)
    else:
        objective = logits_objective(logits, targets, rows)
    return fit_objective(objective, len(logits), constraint, combination, min_weight)


def fit_objective(
    objective: Objective,
    members: int,
    constraint: str = "simplex",
    combination: str = "logits",
    min_weight: float = 0.0,
) -> FittedWeights:
    """Minimise a convex loss of the weights.

    Args:
        objective (`Callable`): value, gradient and Hessian.
        members (`int`): number of adapters.
        constraint (`str`): `simplex` (none below 0, sum 1), `nonnegative` (none below 0 or above 10, any sum) or
            `unconstrained` (between -10 and 10).
        combination (`str`): what is combined; the mean of distributions (`probs`) has weights on the simplex only.
        min_weight (`float`): on the simplex, adapters below it are left out unless one adapter or equal weights are
            then better: a light adapter changes little and costs a forward pass.

    Raises:
        `EnsembleError`: for an unknown constraint or one that the combination does not allow.
    """
    check_constraint(constraint, combination)
    uniform = np.full(members, 1.0 / members)
    starts = [uniform, *np.eye(members)]
    losses = [objective(w)[0] for w in starts]
    best = int(np.argmin(losses))
    weights, loss, gap = minimize_convex(objective, starts[best], constraint)
    if min_weight > 0 and constraint == "simplex":
        kept = np.where(weights < min_weight, 0.0, weights)
        candidates: Sequence[np.ndarray] = [kept / kept.sum(), starts[best]] if kept.any() else [starts[best]]
        lowest = loss - gap
        weights, loss = min(((w, objective(w)[0]) for w in candidates), key=lambda pair: pair[1])
        gap = loss - lowest
    return FittedWeights(weights, loss, gap, losses[0], np.array(losses[1:]), constraint)
