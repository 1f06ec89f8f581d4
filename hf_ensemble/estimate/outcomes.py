"""Losses and accuracies of every task for given surrogate coefficients."""

import numpy as np
import torch

# Maximum number of (mixture, row) pairs in memory at once, in float64.
_CHUNK = 8_000_000


def predicted_outcomes(
    features: np.ndarray, margin: np.ndarray, task: np.ndarray, num_tasks: int, coefficients: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean loss log(1 + exp(-z)), share of z > 0 and root mean square of x.w over each task's rows, where z = m + x.w.

    Args:
        features (`np.ndarray` of shape `(n, k)`):
            Features of the rows to predict. Not copied if they are float64 and sorted by task.
        margin (`np.ndarray` of shape `(n,)`): margins at the linearization point.
        task (`np.ndarray` of shape `(n,)`): index of each row's task; every task has rows.
        num_tasks (`int`): number of tasks, `T`.
        coefficients (`np.ndarray` of shape `(S, k)`): w of each mixture.

    Returns:
        `tuple[np.ndarray, np.ndarray, np.ndarray]`: losses in nats, accuracies and displacements, each `(S, T)`.
    """
    if (np.diff(task) < 0).any():
        order = np.argsort(task, kind="stable")
        features, margin, task = features[order], margin[order], task[order]
    x, m, w = (
        torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64)) for array in (features, margin, coefficients)
    )
    edges = np.searchsorted(task, np.arange(num_tasks + 1))
    loss, accuracy, displacement = np.empty((3, len(w), num_tasks))
    for index, (first, last) in enumerate(zip(edges[:-1], edges[1:])):
        chunk = max(1, _CHUNK // (last - first))
        for start in range(0, len(w), chunk):
            part = slice(start, start + chunk)
            move = w[part] @ x[first:last].T
            displacement[part, index] = move.square().mean(1).sqrt()
            z = move.add_(m[first:last])
            loss[part, index] = -torch.nn.functional.logsigmoid(z).mean(1)
            accuracy[part, index] = (z > 0).double().mean(1)
    return loss, accuracy, displacement
