"""Losses and accuracies of every task for given surrogate coefficients."""

import numpy as np
import torch

# Maximum number of (mixture, row) pairs in memory at once, in float64.
_CHUNK = 8_000_000
# Number of (mixture, row) pairs from which on they are summed up.
_SUMMARIZED = 500_000


def predicted_outcomes(
    features: np.ndarray,
    margin: np.ndarray,
    task: np.ndarray,
    num_tasks: int,
    coefficients: np.ndarray,
    needed: np.ndarray | None = None,
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
    moves: list[tuple[int, np.ndarray, torch.Tensor]] = []
    pairs = 0
    for index, (first, last) in enumerate(zip(edges[:-1], edges[1:])):
        rows = np.arange(len(w)) if needed is None else np.flatnonzero(needed[:, index])
        chunk = max(1, _CHUNK // (last - first))
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            own = x[first:last].to(w.dtype).T
            # Rows of the product are shorter than coefficients: it is cheaper to leave some out afterwards.
            move = (
                (w @ own)[part] if len(w) // 2 < len(part) < len(w) else (w if len(part) == len(w) else w[part]) @ own
            )
            moves.append((index, part, move))
            pairs += move.numel()
            if pairs >= _SUMMARIZED:
                _summarize(moves, m, edges, outcomes)
                moves, pairs = [], 0
    _summarize(moves, m, edges, outcomes)
    return outcomes[0], outcomes[1], outcomes[2]


def _summarize(
    moves: list[tuple[int, np.ndarray, torch.Tensor]], margin: torch.Tensor, edges: np.ndarray, outcomes: np.ndarray
) -> None:
    """Write the outcomes `(3, S, T)` of tasks: index, mixtures `(s,)` and x.w `(s, n)` of each."""
    if not moves:
        return
    move = torch.cat([values.reshape(-1) for _, _, values in moves])
    z = move + torch.cat([margin[edges[index] : edges[index + 1]].repeat(len(part)) for index, part, _ in moves])
    counts = np.concatenate([np.full(len(part), values.shape[1]) for _, part, values in moves])
    mixtures = np.concatenate([part for _, part, _ in moves])
    tasks = np.concatenate([np.full(len(part), index) for index, part, _ in moves])
    starts = np.cumsum(counts) - counts
    values = (-torch.nn.functional.logsigmoid(z), (z > 0).to(z.dtype), move.square_())
    for row, value in enumerate(values):
        mean = np.add.reduceat(value.numpy(), starts) / counts
        outcomes[row, mixtures, tasks] = np.sqrt(mean) if row == 2 else mean
