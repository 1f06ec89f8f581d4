"""The weight of a member that is added to an ensemble: a line search on held-out rows, and whether it gains."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq

from .convex import MAX_WEIGHT
from .objectives import logits_objective


@dataclass(frozen=True)
class AddedAnswers:
    """What an ensemble and an addition to it say of the answers of one task; `n` answer tokens.

    Args:
        logits (`torch.Tensor` of shape `(n, V)`): the ensemble's; minus infinity at labels of other tasks.
        change (`torch.Tensor` of shape `(n, V)`): what is added to them with weight 1.
        targets (`torch.Tensor` of shape `(n,)`): the answer tokens.
        rows (`torch.Tensor` of shape `(n,)`): number of the row that each token belongs to, from 0 on.
    """

    logits: torch.Tensor
    change: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor

    @property
    def num_rows(self) -> int:
        return int(self.rows.max()) + 1

    def of_rows(self, chosen: torch.Tensor) -> "AddedAnswers":
        """Those of some rows, bool `(num_rows,)`."""
        tokens = chosen[self.rows]
        _, rows = self.rows[tokens].unique(return_inverse=True)
        return AddedAnswers(self.logits[tokens], self.change[tokens], self.targets[tokens], rows)

    def row_losses(self, weight: float) -> np.ndarray:
        """Mean token loss of each row with the addition, `(num_rows,)`."""
        impossible = self.logits.isneginf()
        change = self.change.double().masked_fill(impossible, 0.0)
        combined = self.logits.double() + weight * change
        losses = torch.nn.functional.cross_entropy(combined, self.targets, reduction="none")
        counts = torch.bincount(self.rows, minlength=self.num_rows)
        return (torch.zeros(self.num_rows).double().index_add(0, self.rows, losses) / counts).numpy()


@dataclass(frozen=True)
class AddedMember:
    """The weight of an addition, and what it gains on held-out rows; tasks count equally.

    Args:
        weight (`float`): weight with the least mean loss, from 0 to 10.
        loss (`float`): mean loss with it, in nats.
        loss_before (`float`): mean loss without the addition.
        gain (`float`): how much the loss falls on rows that its weight was not found on.
        standard_error (`float`, *optional*): of the gain, paired over rows; `None` for tasks with a single row.
    """

    weight: float
    loss: float
    loss_before: float
    gain: float
    standard_error: float | None

    @property
    def is_gain(self) -> bool:
        """Whether the gain is more than its noise."""
        return self.standard_error is not None and self.weight > 0 and self.gain > self.standard_error


def added_member(answers: Sequence[AddedAnswers], seed: int = 0) -> AddedMember:
    """Find the weight of an addition for one or several tasks.

    The loss is convex in the weight. Its gain is cross-fitted, so that a search that fits noise does not count as one:
    the rows of each task are halved at random, and each half is scored with the weight that is best for the other.

    Args:
        answers (`Sequence[AddedAnswers]`): of each task.
        seed (`int`, *optional*, defaults to 0): of the halves.
    """
    generator = np.random.default_rng(seed)
    halves = [torch.from_numpy(generator.permutation(own.num_rows) % 2 == 0) for own in answers]
    gains = [np.zeros(own.num_rows) for own in answers]
    for fitted in (False, True):
        on = [own.of_rows(half == fitted) for own, half in zip(answers, halves) if bool((half == fitted).any())]
        weight = _best_weight(on)
        for own, half, gain in zip(answers, halves, gains):
            scored = half != fitted
            if bool(scored.any()):
                others = own.of_rows(scored)
                gain[scored.numpy()] = others.row_losses(0.0) - others.row_losses(weight)
    spread = [gain.var(ddof=1) / len(gain) if len(gain) > 1 else None for gain in gains]
    weight = _best_weight(answers)
    return AddedMember(
        weight,
        float(np.mean([own.row_losses(weight).mean() for own in answers])),
        float(np.mean([own.row_losses(0.0).mean() for own in answers])),
        float(np.mean([gain.mean() for gain in gains])),
        None if None in spread else float(np.sqrt(sum(spread)) / len(answers)),
    )


def _best_weight(answers: Sequence[AddedAnswers]) -> float:
    objectives = [logits_objective(torch.stack([own.logits, own.change]), own.targets, own.rows) for own in answers]

    def slope(weight: float) -> float:
        return sum(float(objective(np.array([1.0, weight]))[1][1]) for objective in objectives)

    if not answers or slope(0.0) >= 0:
        return 0.0
    if slope(MAX_WEIGHT) <= 0:
        return MAX_WEIGHT
    return float(brentq(slope, 0.0, MAX_WEIGHT, xtol=1e-4))
