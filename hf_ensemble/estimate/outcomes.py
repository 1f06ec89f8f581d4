"""Losses and accuracies of every task for given surrogate coefficients."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from .output_scale import ScaledRows

# Maximum number of (mixture, row) pairs in memory at once, in float64; five times as much where losses have a scale.
_CHUNK = 8_000_000
# Number of (mixture, row) pairs from which on they are summed up.
_SUMMARIZED = 500_000
# Maximum number of features of tasks that are multiplied at once.
_JOINED = 2_000_000

RowsOfTasks = Callable[[np.ndarray], ScaledRows]


def predicted_outcomes(
    features: np.ndarray,
    margin: np.ndarray,
    task: np.ndarray,
    num_tasks: int,
    coefficients: np.ndarray,
    needed: np.ndarray | None = None,
    scaled_rows: RowsOfTasks | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean loss log(1 + exp(-z)), share of z > 0 and root mean square of x.w over each task's rows, where z = m + x.w.

    Args:
        features (`np.ndarray` of shape `(n, k)`):
            Features of the rows to predict. Copied only if they are not sorted by task.
        margin (`np.ndarray` of shape `(n,)`): margins at the linearization point.
        task (`np.ndarray` of shape `(n,)`): index of each row's task; every task has rows.
        num_tasks (`int`): number of tasks, `T`.
        coefficients (`np.ndarray` of shape `(S, k)`):
            w of each mixture. The products are in its precision, float32 or float64.
        needed (`np.ndarray` of shape `(S, T)`, *optional*): mask of the outcomes to compute; others are NaN.
        scaled_rows (`Callable`, *optional*):
            The rows of tasks `(t,)`, each of them any number of times, as [`ScaledRows`]. The losses are then those
            with a scale of each task's outputs.

    Returns:
        `tuple[np.ndarray, np.ndarray, np.ndarray]`: losses in nats, accuracies and displacements, each `(S, T)`.
    """
    if (np.diff(task) < 0).any():
        order = np.argsort(task, kind="stable")
        features, margin, task = features[order], margin[order], task[order]
    x = torch.from_numpy(np.ascontiguousarray(features))
    m, w = (torch.from_numpy(np.ascontiguousarray(array, dtype=coefficients.dtype)) for array in (margin, coefficients))
    edges = np.searchsorted(task, np.arange(num_tasks + 1))
    outcomes = np.full((3, len(w), num_tasks), np.nan)
    counts = np.full(num_tasks, len(w)) if needed is None else needed.sum(axis=0)
    # Rows of a product are shorter than coefficients: it is cheaper to leave some mixtures out afterwards.
    dense = 2 * counts > len(w)
    for tasks in _joined(np.flatnonzero(dense), edges, x.shape[1], len(w)):
        rows = _rows_of(tasks, edges)
        own, counts_of = x[rows].to(w.dtype), edges[tasks + 1] - edges[tasks]
        scaled = None if scaled_rows is None else scaled_rows(tasks)
        for part in range(0, len(w), chunk := max(1, _CHUNK // len(own))):
            move = w[part : part + chunk] @ own.T
            outcomes[:, part : part + chunk, tasks] = _means(move, m[rows], counts_of, scaled)
    if needed is not None:
        outcomes[:, ~needed] = np.nan
    _add_sparse(x, m, w, edges, np.flatnonzero(~dense & (counts > 0)), needed, outcomes, scaled_rows)
    return outcomes[0], outcomes[1], outcomes[2]


def _joined(tasks: np.ndarray, edges: np.ndarray, width: int, num_mixtures: int) -> Iterator[np.ndarray]:
    """The tasks in parts of at most `_JOINED` features and `_CHUNK` pairs with a mixture, or single ones."""
    most = min(_JOINED // max(1, width), _CHUNK // max(1, num_mixtures))
    ends = np.cumsum(edges[tasks + 1] - edges[tasks])
    first = 0
    while first < len(tasks):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield tasks[first:last]
        first = last


def _rows_of(tasks: np.ndarray, edges: np.ndarray) -> slice | torch.Tensor:
    """Rows of tasks in ascending order; a slice where they follow each other."""
    if tasks[-1] - tasks[0] == len(tasks) - 1:
        return slice(int(edges[tasks[0]]), int(edges[tasks[-1] + 1]))
    return torch.from_numpy(np.concatenate([np.arange(edges[task], edges[task + 1]) for task in tasks]))


def _means(move: torch.Tensor, margin: torch.Tensor, counts: np.ndarray, scaled: ScaledRows | None) -> np.ndarray:
    """Outcomes `(3, s, t)` of tasks with these numbers of rows `(t,)`, from x.w `(s, n)`, which is overwritten."""
    z = move + margin
    odds = z if scaled is None else torch.from_numpy(scaled.scaled(z.numpy()))
    values = (-torch.nn.functional.logsigmoid(odds), (z > 0).to(z.dtype), move.square_())
    means = np.stack([np.add.reduceat(value.numpy(), np.cumsum(counts) - counts, axis=1) / counts for value in values])
    means[2] = np.sqrt(means[2])
    return means


def _add_sparse(
    x: torch.Tensor,
    m: torch.Tensor,
    w: torch.Tensor,
    edges: np.ndarray,
    asked: np.ndarray,
    needed: np.ndarray | None,
    outcomes: np.ndarray,
    scaled_rows: RowsOfTasks | None,
) -> None:
    """Write the outcomes of tasks that few mixtures need."""
    moves: list[tuple[int, np.ndarray, torch.Tensor]] = []
    pairs = 0
    for index in asked.tolist():
        rows, first, last = needed[:, index].nonzero()[0], edges[index], edges[index + 1]
        own = x[first:last].to(w.dtype).T
        for start in range(0, len(rows), chunk := max(1, _CHUNK // (last - first))):
            part = rows[start : start + chunk]
            moves.append((index, part, w[part] @ own))
            pairs += len(part) * (last - first)
            if pairs >= _SUMMARIZED:
                _summarize(moves, m, edges, outcomes, scaled_rows)
                moves, pairs = [], 0
    _summarize(moves, m, edges, outcomes, scaled_rows)


def _summarize(
    moves: list[tuple[int, np.ndarray, torch.Tensor]],
    margin: torch.Tensor,
    edges: np.ndarray,
    outcomes: np.ndarray,
    scaled_rows: RowsOfTasks | None,
) -> None:
    """Write the outcomes `(3, S, T)` of tasks: index, mixtures `(s,)` and x.w `(s, n)` of each."""
    if not moves:
        return
    move = torch.cat([values.reshape(-1) for _, _, values in moves])[None]
    own = torch.cat([margin[edges[index] : edges[index + 1]].repeat(len(part)) for index, part, _ in moves])
    mixtures = np.concatenate([part for _, part, _ in moves])
    tasks = np.concatenate([np.full(len(part), index) for index, part, _ in moves])
    scaled = None if scaled_rows is None else scaled_rows(tasks)
    outcomes[:, mixtures, tasks] = _means(move, own, edges[tasks + 1] - edges[tasks], scaled)[:, 0]
