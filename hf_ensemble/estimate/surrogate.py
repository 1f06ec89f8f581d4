"""The surrogate: a first-order model of fine-tuning on a mixture of tasks, solved for many mixtures at once.

For a mixture a over tasks (GradEx, arXiv 2409.19458, equation 4, with weights instead of a subset):

    w(a) = argmin_w  sum_k a_k sum_{i in k} u_i log(1 + exp(-(m_i + x_i.w))) / sum_k a_k sum_{i in k} u_i + l2(a) |w|^2

with row weights u. Training a language model averages the loss over a batch's tokens, so u_i is the row's number of
answer tokens.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import EstimationError
from .search_rows import sampled_rows
from .solver.newton import TaskRows, WeightedRows, approach, joined, mean_square, minimize
from .solver.toggling import StackedTasks, listed_changes, toggled_optima

# Maximum number of (mixture, row) pairs with a weight in memory at once, at about 30 bytes each.
_CHUNK = 8_000_000
# Maximum number of features of tasks that are joined. It is a copy where these do not follow each other, and a task
# with an eighth of it is fast by itself.
_JOINED = 2_000_000
# Target gradient norm of approximate optima, and maximum number of steps to them.
_NEAR_ENOUGH, _MAX_APPROACH = 1e-6, 50
# Maximum number of features of tasks that are filled up to the same number of rows and kept.
_STACKED = 50_000_000


@dataclass(frozen=True)
class SurrogateSolution:
    """Optima of `S` mixtures.

    Args:
        coefficients (`np.ndarray` of shape `(S, k)`): w of each mixture.
        gradient_norm (`np.ndarray` of shape `(S,)`): norm of the objective's gradient at w.
        iterations (`np.ndarray` of shape `(S,)`): number of Newton steps.
    """

    coefficients: np.ndarray
    gradient_norm: np.ndarray
    iterations: np.ndarray


class SurrogateProblem:
    """Training rows, sorted and converted once for any number of solves.

    Args:
        features (`np.ndarray` of shape `(n, k)`):
            Training features, float32 or float64. Principal components are fastest, because the preconditioner is
            diagonal.
        margin (`np.ndarray` of shape `(n,)`): margins at the linearization point.
        task (`np.ndarray` of shape `(n,)`): index of each row's task.
        device (`torch.device` or `str`, *optional*): device to solve on, with float64. The CPU by default.
        row_weights (`np.ndarray` of shape `(n,)`, *optional*): positive weight of each row's loss. 1 by default.

    Raises:
        `EstimationError`: for features, margins and weights that are not finite, and for weights that are not positive.
    """

    def __init__(
        self,
        features: np.ndarray,
        margin: np.ndarray,
        task: np.ndarray,
        device: torch.device | str | None = None,
        row_weights: np.ndarray | None = None,
    ):
        _check_finite(features=features, margins=margin)
        self.counts = np.bincount(task)
        # Sum of row weights by task.
        self.totals = self.counts.astype(np.float64)
        weights: Sequence[torch.Tensor | None] = [None] * len(self.counts)
        if row_weights is not None:
            _check_finite(**{"row weights": row_weights})
            if (row_weights <= 0).any():
                raise EstimationError(f"Row weights have to be positive, found {row_weights.min()}.")
            self.totals = np.bincount(task, row_weights)
        self.num_components = features.shape[1]
        # Rows are sorted by task, so each product reads contiguous memory.
        order = np.argsort(task, kind="stable")
        self._order = order
        if (np.diff(task) < 0).any():
            features = features[order]
        x = torch.from_numpy(np.ascontiguousarray(features)).to(device)
        m = torch.from_numpy(margin[order].astype(np.float64, copy=False)).to(device)
        if row_weights is not None:
            u = torch.from_numpy(row_weights[order].astype(np.float64, copy=False)).to(device)
            weights = u.split(self.counts.tolist())
        single = x.float()
        self._tasks = [
            TaskRows(rows, rows32, mean_square(rows32), margins, own_weights)
            for rows, rows32, margins, own_weights in zip(
                *(array.split(self.counts.tolist()) for array in (x, single, m)), weights
            )
        ]
        self._edges = np.concatenate([[0], np.cumsum(self.counts)])
        squares = torch.stack([rows.mean_square for rows in self._tasks])
        self._rows = TaskRows(x, single, squares, m, None if row_weights is None else u)
        self._device = x.device
        self._stacked: StackedTasks | None = None

    def truncated(self, num_components: int) -> "SurrogateProblem":
        """The same rows in their first components alone."""
        other = copy.copy(self)
        other.num_components = min(num_components, self.num_components)
        rows = other._rows = self._rows.first_components(other.num_components)
        other._tasks = [
            rows.part(slice(first, last), squares)
            for first, last, squares in zip(self._edges[:-1], self._edges[1:], rows.mean_square)
        ]
        other._stacked = None
        return other

    def sampled(self, most_rows: int, seed: int = 0) -> "SurrogateProblem":
        """The same from some rows of each task, whose weights add up to those of all its rows; see [`sampled_rows`]."""
        task = np.repeat(np.arange(len(self.counts)), self.counts)
        kept = sampled_rows(task, self._rows.margin.cpu().numpy(), most_rows, seed)
        there = torch.from_numpy(kept).to(self._device)
        weight = np.ones(len(kept)) if self._rows.weight is None else self._rows.weight[there].cpu().numpy()
        task = task[kept]
        weight *= (self.totals / np.bincount(task, weight))[task]
        features, margin = self._rows.given[there].cpu().numpy(), self._rows.margin[there].cpu().numpy()
        return SurrogateProblem(features, margin, task, self._device, weight)

    def rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features `(n, k)`, margins and task of every row `(n,)`, sorted by task."""
        features, margin = self._rows.given.cpu().numpy(), self._rows.margin.cpu().numpy()
        return features, margin, np.repeat(np.arange(len(self.counts)), self.counts)

    def some_rows(self, task: int, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features `(m, k)`, margins and weights `(m,)` of evenly spaced rows of a task, at most `most`; float32."""
        rows = self._tasks[task]
        count = len(rows.margin)
        places = torch.arange(min(most, count), device=self._device) * count // min(most, count)
        weight = rows.weighted(torch.ones_like(rows.margin))[places]
        return tuple(values.float().cpu().numpy() for values in (rows.single[places], rows.margin[places], weight))

    def solve(
        self,
        mixtures: np.ndarray,
        l2: np.ndarray,
        tolerance: float = 1e-8,
        max_iterations: int = 50,
        initial: np.ndarray | None = None,
    ) -> SurrogateSolution:
        """Solve the surrogate of every mixture by Newton's method with conjugate gradients.

        Time is linear in the number of (mixture, row) pairs with a weight; no Hessian is formed. Mixtures are solved in
        chunks, so memory does not grow with their number except for the result.

        Args:
            mixtures (`np.ndarray` of shape `(S, T)`): weight of a row of each task; 0 and 1 for subsets.
            l2 (`np.ndarray` of shape `(S,)`): ridge penalty of each mixture.
            tolerance (`float`, *optional*, defaults to 1e-8): target gradient norm.
            max_iterations (`int`, *optional*, defaults to 50): maximum number of Newton steps.
            initial (`np.ndarray` of shape `(S, k)`, *optional*):
                Initial coefficients, such as the optima of similar mixtures. The linearization point w = 0 by default.

        Raises:
            `EstimationError`:
                For empty mixtures, values that are negative or not finite, wrong shapes, and missed tolerances.
        """
        mixtures = np.asarray(mixtures, dtype=np.float64)
        l2 = np.broadcast_to(np.asarray(l2, dtype=np.float64), len(mixtures))
        if mixtures.ndim != 2 or mixtures.shape[1] < len(self.counts):
            raise EstimationError(f"Expected mixtures over {len(self.counts)} tasks, found shape {mixtures.shape}.")
        _check_finite(mixtures=mixtures, l2=l2)
        if (mixtures < 0).any():
            raise EstimationError(f"Mixture {int(np.argmax((mixtures < 0).any(axis=1)))} has a negative weight.")
        if (l2 <= 0).any():
            raise EstimationError("l2 has to be positive, as the surrogate has no minimum otherwise.")
        counts = np.pad(self.counts, (0, mixtures.shape[1] - len(self.counts)))
        totals = mixtures[:, : len(counts)] @ np.pad(self.totals, (0, len(counts) - len(self.totals)))
        if (totals == 0).any():
            raise EstimationError(f"Mixture {int(np.argmin(totals))} is empty: no training row has a positive weight.")
        if initial is not None:
            initial = np.asarray(initial, dtype=np.float64)
            if initial.shape != (len(mixtures), self.num_components):
                raise EstimationError(
                    f"Expected initial coefficients of shape {(len(mixtures), self.num_components)}, found "
                    f"{initial.shape}."
                )
            _check_finite(**{"initial coefficients": initial})
        row_weights = mixtures / totals[:, None]
        parts = [
            self._solve_chunk(
                row_weights[part], l2[part], None if initial is None else initial[part], tolerance, max_iterations
            )
            for part in _chunks((mixtures > 0) @ counts)
        ]
        return SurrogateSolution(*(np.concatenate(arrays) for arrays in zip(*parts)))

    def approached(self, mixtures: np.ndarray, l2: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
        """Approximate optima of mixtures `(S, T)`, `(S, k)`, from the steps in float32 that [`solve`] begins with.

        Args:
            mixtures (`np.ndarray` of shape `(S, T)`): weight of a row of each task, none of them empty.
            l2 (`np.ndarray` of shape `(S,)`): ridge penalty of each mixture.
            start (`np.ndarray` of shape `(S, k)`, *optional*): float32 coefficients to start from. Zero by default.
        """
        row_weights = mixtures / (mixtures @ self.totals)[:, None]
        found = []
        for part in _chunks((mixtures > 0) @ self.counts):
            weights = torch.from_numpy(row_weights[part]).float().to(self._device)
            ridge = 2 * torch.from_numpy(l2[part].copy()).float().to(self._device).unsqueeze(1)
            w = None if start is None else torch.from_numpy(start[part].copy()).to(self._device)
            blocks = self._blocks(weights, w)
            found.append(approach(blocks, ridge, _NEAR_ENOUGH, _MAX_APPROACH, w)[0].cpu().numpy())
        return np.concatenate(found)

    def toggled(
        self, mixture: np.ndarray, w: np.ndarray, l2: float, tasks: np.ndarray, weights: np.ndarray, new_l2: np.ndarray
    ) -> np.ndarray:
        """Approximate optima `(C, k)` of a mixture `(T,)` with one task more or one less; see [`toggled_optima`].

        Args:
            mixture (`np.ndarray` of shape `(T,)`): the known mixture.
            w (`np.ndarray` of shape `(k,)`): its optimum.
            l2 (`float`): its penalty.
            tasks (`np.ndarray` of shape `(C,)`): the task of each change; removed where the mixture has it.
            weights (`np.ndarray` of shape `(C,)`): weight of a row of the task where it is added.
            new_l2 (`np.ndarray` of shape `(C,)`): penalty of each changed mixture.
        """
        signed = np.where(mixture[tasks] > 0, -mixture[tasks], weights)
        total, point = float(mixture @ self.totals), torch.from_numpy(w.copy()).to(self._device)
        row_weights = torch.from_numpy(mixture[None].astype(np.float32)).to(self._device)
        if self._is_stackable(tasks):
            # Those of all tasks are found: no rows are copied for them, as they would be for some.
            sign, penalties = np.zeros(len(self.counts)), np.full(len(self.counts), l2)
            sign[tasks], penalties[tasks] = signed, new_l2
            changes, totals = self._stacked.changes(sign, point), total + sign * self.totals
        else:
            changed = [(self._tasks[index], float(weight)) for index, weight in zip(tasks, signed)]
            changes, totals, penalties = listed_changes(changed, point), total + signed * self.totals[tasks], new_l2
        found = toggled_optima(
            [(block.rows, block.weight[0]) for block in self._blocks(row_weights)],
            changes,
            total,
            torch.from_numpy(totals).to(self._device),
            l2,
            torch.from_numpy(penalties.copy()).to(self._device),
            point,
        )
        return (found[tasks] if len(penalties) > len(tasks) else found).cpu().numpy()

    def _is_stackable(self, tasks: np.ndarray) -> bool:
        """Whether changes by these tasks, most of all, are found from the rows of all tasks filled up to one length."""
        longest, count, total = int(self.counts.max()), len(self.counts), int(self.counts.sum())
        if 2 * len(np.unique(tasks)) < count or len(np.unique(tasks)) < len(tasks):
            return False
        # Tasks of the same size are not copied.
        if longest * count > min(2 * total, max(total, _STACKED // max(1, self.num_components))):
            return False
        if self._stacked is None:
            self._stacked = StackedTasks.of(self._tasks, self._rows.single)
        return True

    def derivatives(
        self, mixture: np.ndarray, w: np.ndarray, l2: float, tasks: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Hessian `(k, k)` of a mixture's objective at w `(k,)`, and each task's summed loss gradient `(T, k)`.

        With a mask `tasks` `(T,)`, which holds all tasks of the mixture, the gradients of the others are zero.
        """
        point = torch.from_numpy(np.ascontiguousarray(w, dtype=np.float64)).to(self._device)
        hessian = 2 * l2 * torch.eye(len(w), dtype=torch.float64, device=self._device)
        gradients = torch.zeros(len(mixture), len(w), dtype=torch.float64, device=self._device)
        total = float(mixture[: len(self.counts)] @ self.totals)
        for task, rows in enumerate(self._tasks):
            if tasks is not None and not tasks[task]:
                continue
            wrong = torch.sigmoid(-(rows.margin + rows.products(point[None])[0]))
            gradients[task] = -rows.sums(rows.weighted(wrong)[None])[0]
            if mixture[task]:
                curvature = (rows.weighted(wrong * (1 - wrong)) * float(mixture[task]) / total).unsqueeze(1)
                for part, features in rows.parts():
                    hessian += features.T @ (curvature[part] * features)
        return hessian.cpu().numpy(), gradients.cpu().numpy()

    def task_slopes(self, w: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Slope of each task's summed loss at points w `(S, k)` along directions `(S, k)`, `(S, T)`, in float32."""
        points, along = (torch.from_numpy(array.astype(np.float32)).to(self._device) for array in (w, directions))
        slopes = torch.zeros(len(w), len(self._tasks), dtype=torch.float64, device=self._device)
        for task, rows in enumerate(self._tasks):
            if len(rows.margin):
                wrong = torch.sigmoid(-(rows.margin.float() + points @ rows.single.T))
                slopes[:, task] = -(rows.weighted(wrong) * (along @ rows.single.T)).sum(1)
        return slopes.cpu().numpy()

    def row_slopes(self, w: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """Slope of every row's weighted loss at w `(k,)` along a direction `(k,)`, in the original row order."""
        point, along = (torch.from_numpy(array.copy()).to(self._device) for array in (w, direction))
        slopes = [
            -rows.weighted(torch.sigmoid(-(rows.margin + rows.products(point[None])[0])))
            * rows.products(along[None])[0]
            for rows in self._tasks
        ]
        out = np.empty(len(self._order))
        out[self._order] = torch.cat(slopes).cpu().numpy()
        return out

    def _solve_chunk(self, row_weights, l2, start, tolerance, max_iterations):
        weights = torch.from_numpy(row_weights).to(self._device)
        ridge = 2 * torch.from_numpy(l2.copy()).to(self._device).unsqueeze(1)
        if start is None:
            w, approached = approach(self._blocks(weights.float()), ridge.float(), tolerance, max_iterations)
            w, max_left = w.double(), max_iterations - int(approached.max())
        else:
            w, approached, max_left = torch.from_numpy(start.copy()).to(self._device), 0, max_iterations
        w, norm, steps = minimize(self._blocks(weights, w), w, ridge, tolerance, max_left)
        if not (norm <= tolerance).all():
            raise EstimationError(
                f"The surrogate did not reach the gradient norm {tolerance} in {max_iterations} steps (found "
                f"{float(norm.max()):.2g}). Raise max_iterations or l2."
            )
        return w.cpu().numpy(), norm.cpu().numpy(), (steps + approached).cpu().numpy()

    def _blocks(self, weights: torch.Tensor, w: torch.Tensor | None = None) -> list[WeightedRows]:
        """Rows of the tasks with a weight, in the precision of `weights` `(S, T)`, at w or at the start w = 0."""
        blocks = []
        for tasks in self._alike(weights > 0):
            rows = self._joined(tasks)
            using = weights[:, tasks[0]].nonzero()[:, 0]
            weight = weights[using][:, tasks]
            if len(tasks) > 1:
                counts = torch.as_tensor(self.counts[tasks], device=self._device)
                weight = weight.repeat_interleave(counts, dim=1)
            if w is None:
                z = rows.margin.to(weights.dtype).repeat(len(using), 1)
            else:
                z = rows.margin.to(w.dtype) + rows.products(w[using])
            blocks.append(WeightedRows(rows, using, weight, z))
        return blocks

    def _joined(self, tasks: list[int]) -> TaskRows:
        """The rows of tasks in ascending order as those of one; copied where these do not follow each other."""
        if len(tasks) == 1 or tasks[-1] - tasks[0] >= len(tasks):
            return joined([self._tasks[task] for task in tasks])
        first, last = tasks[0], tasks[-1] + 1
        counts = torch.from_numpy(self.counts[first:last]).to(self._rows.mean_square)
        squares = counts @ self._rows.mean_square[first:last] / counts.sum()
        return self._rows.part(slice(self._edges[first], self._edges[last]), squares)

    def _alike(self, used: torch.Tensor) -> list[list[int]]:
        """Tasks that the same mixtures use `(S, T)`, together up to `_JOINED` features: products of many rows are fast.

        Tasks without rows and those that no mixture uses are left out.
        """
        open_lists: dict[bytes, tuple[list[int], int]] = {}
        found = []
        patterns = used.T.cpu().numpy()
        for task in np.flatnonzero(patterns.any(axis=1)[: len(self.counts)] & (self.counts > 0)).tolist():
            key, size = patterns[task].tobytes(), int(self.counts[task]) * self.num_components
            own, joined_size = open_lists.get(key, ([], 0))
            # A list of tasks that follow each other is no copy.
            follows = own and own[-1] == task - 1 and own[-1] - own[0] == len(own) - 1
            if own and joined_size + size <= _JOINED and (follows or size <= _JOINED // 8):
                own.append(task)
            else:
                own, joined_size = [task], 0
                found.append(own)
            open_lists[key] = own, joined_size + size
        return found


def solve_surrogate(
    features: np.ndarray,
    margin: np.ndarray,
    task: np.ndarray,
    mixtures: np.ndarray,
    l2: np.ndarray,
    tolerance: float = 1e-8,
    max_iterations: int = 50,
    initial: np.ndarray | None = None,
    device: torch.device | str | None = None,
    row_weights: np.ndarray | None = None,
) -> SurrogateSolution:
    """Create a [`SurrogateProblem`] and solve it; see there for the arguments."""
    problem = SurrogateProblem(features, margin, task, device, row_weights)
    return problem.solve(mixtures, l2, tolerance, max_iterations, initial)


def _check_finite(**arrays: np.ndarray) -> None:
    for name, array in arrays.items():
        # By parts: the mask of many features would take a quarter of their memory.
        if not all(np.isfinite(part).all() for part in np.array_split(array, 1 + array.size // _JOINED)):
            raise EstimationError(f"Expected finite {name}, found a value that is not finite.")


def _chunks(pairs: np.ndarray) -> list[slice]:
    """Slices of consecutive mixtures whose numbers of rows `pairs` `(S,)` sum to about `_CHUNK`."""
    chunk = (np.cumsum(pairs) - pairs) // _CHUNK
    edges = np.flatnonzero(np.diff(chunk, prepend=-1, append=chunk[-1:] + 1))
    return [slice(start, stop) for start, stop in zip(edges[:-1], edges[1:])]
