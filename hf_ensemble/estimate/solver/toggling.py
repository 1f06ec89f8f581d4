"""Optima of the mixtures that differ from one mixture by a single task, to second order.

A Newton step from the known optimum w of a mixture: with the sum A of the mixture's weighted Hessians at w, the Hessian
of a changed mixture is A plus or minus one task's part, which has the rank of the task's rows. The inverse of A plus
the ridge is thus a preconditioner with which conjugate gradients take a few steps for any number of changes at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from .newton import TaskRows

# Steps of conjugate gradients: the Newton step is then known to a few percent, its effect on losses far better.
_STEPS = 2
# Maximum number of features of changed tasks that are copied next to each other.
_FILLED = 4_000_000
# Number of features that are gone through twice while they are in the processor's cache.
_CACHED = 1_000_000


def toggled_optima(
    base: list[tuple[TaskRows, torch.Tensor]],
    changes: list["Changes"],
    total: float,
    totals: torch.Tensor,
    l2: float,
    new_l2: torch.Tensor,
    w: torch.Tensor,
) -> torch.Tensor:
    """Approximate optima of `C` mixtures, `(C, k)`, float32.

    Args:
        base (`list[tuple[TaskRows, torch.Tensor]]`): rows of the known mixture and their weights, `(n,)` or `(1,)`.
        changes (`list[Changes]`): the changes' parts at w, in order.
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
    inverse = torch.cholesky_inverse(factor.float())
    # At the optimum, the known tasks' gradients add up to minus the penalty's.
    gradient = (torch.cat([part.gradient for part in changes]) - ridge * total * w) / totals + 2 * new_l2 * w

    def product(v: torch.Tensor) -> torch.Tensor:
        own = torch.cat([part.product(v[part.places]) for part in changes])
        return own.addmm_(v, known) / totals + 2 * new_l2 * v

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


@dataclass
class Changes:
    """Some of the changes: rows `(c, n, k)` of their tasks, filled up with zeros, and their parts at a point w."""

    places: slice
    rows: torch.Tensor
    curvature: torch.Tensor
    gradient: torch.Tensor

    @classmethod
    def at(
        cls,
        w: torch.Tensor,
        places: slice,
        rows: torch.Tensor,
        margin: torch.Tensor,
        weight: torch.Tensor,
        sign: torch.Tensor,
    ) -> "Changes":
        """From margins and weights of the rows `(c, n)`, and weights of their tasks `(c,)`, negative if removed."""
        wrong = torch.sigmoid(-(margin + rows @ w))
        slope = weight * wrong * sign.unsqueeze(1)
        return cls(places, rows, slope * (1 - wrong), -_sums(slope, rows))

    def product(self, v: torch.Tensor) -> torch.Tensor:
        """Hessians of the changes times v `(c, k)`."""
        return _sums((self.rows @ v.unsqueeze(2)).squeeze(2) * self.curvature, self.rows)


def listed_changes(changed: list[tuple[TaskRows, float]], w: torch.Tensor) -> list[Changes]:
    """Changes by tasks with these weights, negative where they are removed, at w `(k,)`."""
    w, found = w.float(), []
    for places in _slices(changed):
        tasks = [rows for rows, _ in changed[places]]
        rows = _filled([task.single for task in tasks])
        margin = _filled([task.margin.float() for task in tasks])
        weight = _filled([task.weighted(torch.ones_like(task.margin)).float() for task in tasks])
        sign = torch.tensor([sign for _, sign in changed[places]], device=w.device)
        found.append(Changes.at(w, places, rows, margin, weight, sign))
    return found


@dataclass
class StackedTasks:
    """All tasks' rows `(T, n, k)`, filled up with zeros, with their margins and weights `(T, n)`, float32."""

    rows: torch.Tensor
    margin: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def of(cls, tasks: list[TaskRows], single: torch.Tensor) -> "StackedTasks":
        """From the tasks and their features `(n, k)`, one after the other; copied where the tasks' sizes differ."""
        weights = [task.weighted(torch.ones_like(task.margin)).float() for task in tasks]
        is_even = len({len(task.margin) for task in tasks}) == 1
        shape = (len(tasks), -1, single.shape[1])
        rows = single.view(shape) if is_even else _filled([task.single for task in tasks])
        return cls(rows, _filled([task.margin.float() for task in tasks]), _filled(weights))

    def changes(self, sign: np.ndarray, w: torch.Tensor) -> list[Changes]:
        """Changes by every task with the weights `sign` `(T,)`, at w `(k,)`."""
        w, sign = w.float(), torch.from_numpy(sign).float().to(w.device)
        step = max(1, _CACHED // max(1, self.rows[0].numel()))
        places = [slice(start, start + step) for start in range(0, len(self.rows), step)]
        return [Changes.at(w, own, self.rows[own], self.margin[own], self.weight[own], sign[own]) for own in places]


def _slices(changed: list[tuple[TaskRows, float]]) -> Iterator[slice]:
    """Consecutive changes with at most `_FILLED` features, or single ones."""
    start, longest = 0, 0
    for index, (rows, _) in enumerate(changed):
        count, width = rows.single.shape
        longest = max(longest, count)
        if index > start and (index + 1 - start) * longest * width > _FILLED:
            yield slice(start, index)
            start, longest = index, count
    yield slice(start, len(changed))


def _filled(arrays: list[torch.Tensor]) -> torch.Tensor:
    """Stacked arrays `(n, ...)`, filled up with zeros; a single one is not copied."""
    return arrays[0].unsqueeze(0) if len(arrays) == 1 else pad_sequence(arrays, batch_first=True)


def _sums(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Weighted sums `(c, k)` of rows `(c, n, k)` by weights `(c, n)`."""
    return (weights.unsqueeze(1) @ rows).squeeze(1)


def _derivatives(rows: TaskRows, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted slope and curvature of every row's loss, `(n,)`."""
    wrong = torch.sigmoid(-(rows.margin.float() + rows.single @ w))
    slope = rows.weighted(wrong)
    return slope, slope * (1 - wrong)
