"""Newton's method for many mixtures at once, task by task.

Rows without a weight cost nothing: every matrix product is between the rows of one task and the mixtures that use the
task. The first steps are in float32. Near the optimum, objective, gradient and the stopping test are in float64, while
the linear systems stay in float32, because the next gradient corrects their rounding (iterative refinement).
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .conjugate_gradient import conjugate_gradient

# Bounds of the relative accuracy of a Newton step: loose far from the optimum, and never beyond float32.
_LOOSEST, _TIGHTEST = 0.1, 1e-3
# From this gradient norm on, one Newton step comes close to the optimum, and float32 gradients are still accurate.
_NEAR = 1e-4
# Maximum number of Newton steps in float32.
_MAX_FLOAT32_STEPS = 15
# Maximum number of features in float64 at once, where they are given in float32.
_CONVERTED = 2_000_000

_memory = threading.local()


@dataclass
class TaskRows:
    """The `n` rows of one task, or of several.

    Args:
        given (`torch.Tensor` of shape `(n, k)`): features in float32 or float64.
        single (`torch.Tensor` of shape `(n, k)`): features in float32; the same tensor where those are.
        mean_square (`torch.Tensor` of shape `(k,)`): mean of the squared features, float32.
        margin (`torch.Tensor` of shape `(n,)`): margins at the linearization point, float64.
        weight (`torch.Tensor` of shape `(n,)`, *optional*): weight of each row's loss, float64. 1 by default.
    """

    given: torch.Tensor
    single: torch.Tensor
    mean_square: torch.Tensor
    margin: torch.Tensor
    weight: torch.Tensor | None = None

    def parts(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Consecutive rows with their features in float64; valid until the next ones are asked for, by anyone.

        Features in float32 are converted as they are used: a copy of all would triple the memory.
        """
        if self.given.dtype == torch.float64:
            yield slice(None), self.given
            return
        rows = max(1, _CONVERTED // max(1, self.given.shape[1]))
        for start in range(0, len(self.given), rows):
            part = slice(start, start + rows)
            yield part, _converted(self.given[part])

    def products(self, w: torch.Tensor) -> torch.Tensor:
        """x.w of every row for coefficients `(S, k)`, `(S, n)`, in their precision."""
        if w.dtype != torch.float64:
            return w @ self.single.T
        found = w.new_empty(len(w), len(self.given))
        for part, features in self.parts():
            found[:, part] = w @ features.T
        return found

    def sums(self, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sums `(S, k)` of the rows by weights `(S, n)`, in their precision."""
        if weights.dtype != torch.float64:
            return weights @ self.single
        return sum(weights[:, part] @ features for part, features in self.parts())

    def part(self, rows: slice, mean_square: torch.Tensor) -> "TaskRows":
        """Some of the rows, which are not copied, with the mean of their squares `(k,)`."""
        weight = None if self.weight is None else self.weight[rows]
        return TaskRows(self.given[rows], self.single[rows], mean_square, self.margin[rows], weight)

    def first_components(self, num_components: int) -> "TaskRows":
        """The same rows in their first components; the mean squares may be those of several tasks."""
        given = self.given[:, :num_components].contiguous()
        return replace(self, given=given, single=given.float(), mean_square=self.mean_square[..., :num_components])

    def weighted(self, values: torch.Tensor) -> torch.Tensor:
        """Multiply values `(..., n)` by the row weights."""
        return values if self.weight is None else values * self.weight.to(values.dtype)


def _converted(features: torch.Tensor) -> torch.Tensor:
    """A copy in float64; on the CPU in memory that the next copy overwrites.

    New memory for every copy, with what is kept between them, splits the heap into pieces that the next one does not
    fit into: a process grows by gigabytes.
    """
    if features.device.type != "cpu":
        return features.double()
    memory = getattr(_memory, "converted", None)
    if memory is None or memory.numel() < features.numel():
        memory = _memory.converted = torch.empty(features.numel(), dtype=torch.float64)
    return memory[: features.numel()].view(features.shape).copy_(features)


def mean_square(features: torch.Tensor) -> torch.Tensor:
    """Mean of the squared features `(n, k)` over the rows, `(k,)`, without a copy of them; see [`_converted`]."""
    return torch.linalg.vector_norm(features, dim=0).square() / max(len(features), 1)


def joined(tasks: list[TaskRows]) -> TaskRows:
    """The rows of several tasks as those of one; copied."""
    if len(tasks) == 1:
        return tasks[0]
    given = torch.cat([rows.given for rows in tasks])
    single = given.float()
    weight = None if tasks[0].weight is None else torch.cat([rows.weight for rows in tasks])
    margin = torch.cat([rows.margin for rows in tasks])
    return TaskRows(given, single, mean_square(single), margin, weight)


@dataclass
class WeightedRows:
    """Rows of one task, or of several, under the `s` mixtures that use them.

    Args:
        rows (`TaskRows`): the rows.
        mixtures (`torch.Tensor` of shape `(s,)`): indices of these mixtures among all mixtures being solved.
        weight (`torch.Tensor` of shape `(s, 1)` or `(s, n)`): positive weight of the rows.
        z (`torch.Tensor` of shape `(s, n)`): m + x.w of every row.
        curvature (`torch.Tensor` of shape `(s, n)`, *optional*):
            Second derivative of every row's weighted loss, float32; set by [`differentiate`].
    """

    rows: TaskRows
    mixtures: torch.Tensor
    weight: torch.Tensor
    z: torch.Tensor
    curvature: torch.Tensor | None = None

    def loss(self, z: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the rows' losses, `(s,)`."""
        losses = self.rows.weighted(torch.nn.functional.logsigmoid(z))
        if self.weight.shape[1] == 1:
            return -losses.sum(1) * self.weight[:, 0]
        return -(losses * self.weight).sum(1)

    def differentiate(self) -> torch.Tensor:
        """Gradient of the loss, `(s, k)`; also sets the curvature."""
        wrong = torch.sigmoid(-self.z)
        slope = self.rows.weighted(self.weight * wrong)
        self.curvature = (slope * (1 - wrong)).float()
        return -self.rows.sums(slope)

    def restricted(self, kept: torch.Tensor) -> "WeightedRows":
        """The same rows with only the mixtures in the mask `kept` `(S,)`, renumbered."""
        own = kept[self.mixtures]
        position = torch.cumsum(kept, 0) - 1
        return WeightedRows(self.rows, position[self.mixtures[own]], self.weight[own], self.z[own], self.curvature[own])


def approach(
    blocks: list[WeightedRows],
    ridge: torch.Tensor,
    tolerance: float,
    max_iterations: int,
    start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move from w = 0 or a start to a point near the optimum, in float32, for `S` mixtures.

    The last step is not checked, as [`minimize`] starts from the result.

    Args:
        blocks (`list[WeightedRows]`): tasks used by any of the mixtures, in float32, with z at the start.
        ridge (`torch.Tensor` of shape `(S, 1)`): strength of the penalty, float32.
        tolerance (`float`): target gradient norm.
        max_iterations (`int`): maximum number of Newton steps.
        start (`torch.Tensor` of shape `(S, k)`, *optional*): float32 coefficients to start from. Zero by default.

    Returns:
        `tuple`: coefficients `(S, k)` and numbers of Newton steps `(S,)`.
    """
    w = ridge.new_zeros(len(ridge), blocks[0].rows.single.shape[1]) if start is None else start
    value = _objective(blocks, w, ridge)
    solution, steps = w.clone(), torch.zeros(len(w), dtype=torch.long, device=w.device)
    left = torch.arange(len(w), device=w.device)
    for iteration in range(1, min(max_iterations, _MAX_FLOAT32_STEPS) + 1):
        gradient, norm = _gradient(blocks, w, ridge)
        step = -_newton_direction(blocks, gradient, norm, ridge, tolerance)
        solution[left], steps[left] = w + step, iteration
        far = norm > _NEAR
        if not far.any():
            break
        if not far.all():
            blocks = [block.restricted(far) for block in blocks]
            left, w, ridge, value, gradient, step = (a[far] for a in (left, w, ridge, value, gradient, step))
        w, value = _line_search(blocks, w, value, step, (gradient * step).sum(1), ridge)
        solution[left] = w
    return solution, steps


def minimize(
    blocks: list[WeightedRows], start: torch.Tensor, ridge: torch.Tensor, tolerance: float, max_iterations: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Minimize the weighted loss plus ridge/2 |w|^2 in float64, for `S` mixtures.

    Args:
        blocks (`list[WeightedRows]`): tasks used by any of the mixtures, with z at the start.
        start (`torch.Tensor` of shape `(S, k)`): initial coefficients.
        ridge (`torch.Tensor` of shape `(S, 1)`): strength of the penalty.
        tolerance (`float`): target gradient norm.
        max_iterations (`int`): maximum number of Newton steps.

    Returns:
        `tuple`: coefficients `(S, k)`, gradient norms `(S,)` and numbers of Newton steps `(S,)`. The norm is above the
        tolerance for mixtures that did not converge.
    """
    solution, norms = start.clone(), torch.empty_like(start[:, 0])
    steps = torch.zeros(len(start), dtype=torch.long, device=start.device)
    left = torch.arange(len(start), device=start.device)
    w, value = start, _objective(blocks, start, ridge)
    for iteration in range(max_iterations + 1):
        gradient, norm = _gradient(blocks, w, ridge)
        solution[left], norms[left], steps[left] = w, norm, iteration
        kept = ~(norm <= tolerance)
        if not kept.any() or iteration == max_iterations:
            break
        if not kept.all():
            blocks = [block.restricted(kept) for block in blocks]
            left, w, ridge, value, gradient, norm = (a[kept] for a in (left, w, ridge, value, gradient, norm))
        step = -_newton_direction(blocks, gradient, norm, ridge, tolerance)
        w, value = _line_search(blocks, w, value, step, (gradient * step).sum(1), ridge)
    return solution, norms, steps


def _gradient(blocks, w, ridge):
    """Gradients and their norms; also sets the blocks' curvature."""
    gradient = ridge * w
    for block in blocks:
        gradient.index_add_(0, block.mixtures, block.differentiate())
    return gradient, gradient.norm(dim=1)


def _objective(blocks, w, ridge):
    value = 0.5 * (ridge * w * w).sum(1)
    for block in blocks:
        value.index_add_(0, block.mixtures, block.loss(block.z))
    return value


def _line_search(blocks, w, value, step, slope, ridge):
    """Halve each mixture's step until its objective decreases sufficiently (Armijo 1966); updates the blocks' z."""
    z_steps = [block.rows.products(step[block.mixtures]) for block in blocks]
    size, rounding = torch.ones_like(ridge), 5 * torch.finfo(value.dtype).eps
    for halvings in range(41):
        trial = w + size * step
        trial_value = 0.5 * (ridge * trial * trial).sum(1)
        for block, z_step in zip(blocks, z_steps):
            trial_value.index_add_(0, block.mixtures, block.loss(torch.addcmul(block.z, size[block.mixtures], z_step)))
        # At the optimum, values differ by rounding only.
        worse = trial_value > value + 1e-4 * size[:, 0] * slope + rounding * value.abs() + 1e-18
        if not worse.any() or halvings == 40:
            break
        size = torch.where(worse.unsqueeze(1), size / 2, size)
    for block, z_step in zip(blocks, z_steps):
        block.z.addcmul_(size[block.mixtures], z_step)
    return trial, trial_value


def _newton_direction(blocks, gradient, norm, ridge, tolerance):
    """Solve (X^T diag(c) X + ridge) v = gradient for every mixture, in float32."""
    # Accuracy that follows the outer iteration keeps Newton's fast convergence (Dembo et al. 1982), and more than the
    # tolerance requires is wasted.
    target = torch.maximum(norm.sqrt().clamp(_TIGHTEST, _LOOSEST), 0.3 * tolerance / norm).clamp(max=_LOOSEST)
    # Jacobi preconditioner: principal components make the Hessian nearly diagonal. The mean curvature of a task's rows
    # is accurate enough and saves a matrix product.
    diagonal = ridge.float().expand(gradient.shape).clone()
    for block in blocks:
        diagonal.index_add_(0, block.mixtures, block.curvature.sum(1, keepdim=True) * block.rows.mean_square)
    terms = [(block.curvature, block.mixtures, block.rows.single) for block in blocks]
    # Scaled to norm 1, small gradients stay in the range of float32; those of rows without features are zero.
    scaled = (gradient / norm.clamp_min(torch.finfo(norm.dtype).tiny).unsqueeze(1)).float()
    direction = conjugate_gradient(terms, diagonal, ridge.float(), scaled, target.float())
    return norm.unsqueeze(1) * direction.to(norm.dtype)
