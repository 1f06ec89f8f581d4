"""Sums over the tokens or rows of each task. Pure functions of tensors, and a running sum."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...tasks import IGNORE_INDEX


def counted(labels: torch.Tensor, shift: bool) -> torch.Tensor:
    """Which labels a loss is averaged over, bool `(B, T)`; `(B, 1)` for a classifier's labels `(B,)`.

    Args:
        labels (`torch.Tensor` of shape `(B, T)` or `(B,)`): -100 for tokens to ignore.
        shift (`bool`): whether position t predicts label t + 1; the first label is then left out.
    """
    if labels.dim() == 1:
        labels = labels.unsqueeze(1)
    elif shift:
        labels = labels[:, 1:]
    return labels != IGNORE_INDEX


def owners(
    tasks: Sequence[str], names: Mapping[str, int], labels: torch.Tensor, row_lengths: Sequence[int] | None = None
) -> torch.Tensor:
    """Index of the task that each label of a batch belongs to: `(B, 1)`, or `(1, T)` for rows one after another.

    Args:
        tasks (`Sequence[str]`): task of each row.
        names (`dict[str, int]`): index of each task.
        labels (`torch.Tensor`): the batch's labels.
        row_lengths (`Sequence[int]`, *optional*): tokens of each row, where the batch has them in a single row.
    """
    index = torch.tensor([names[task] for task in tasks], device=labels.device)
    if row_lengths is None:
        return index.unsqueeze(1)
    # With the number of tokens, which would otherwise be read off the device.
    lengths = torch.tensor(row_lengths, device=labels.device)
    flat = index.repeat_interleave(lengths, output_size=sum(row_lengths))
    # Padding at the end has no labels, so that it may count as the last row's.
    padding = flat[-1:].expand(labels.shape[1] - len(flat))
    return torch.cat([flat, padding]).unsqueeze(0)


def spread(values: torch.Tensor, owner: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Each task's value `(K,)` at every token of a batch, `shape`."""
    return values[owner[:, -shape[1] :] if owner.shape[1] > 1 else owner].expand(shape)


def sums_by_task(values: torch.Tensor, owner: torch.Tensor, num_tasks: int) -> torch.Tensor:
    """Sum of per-token values `(B, T)` over each task's tokens, `(K,)`."""
    index = spread(torch.arange(num_tasks, device=owner.device), owner, values.shape)
    return values.new_zeros(num_tasks).index_add(0, index.reshape(-1), values.reshape(-1))


class TaskLosses:
    """Sum of the losses of each task's tokens since the last log, on this process.

    Args:
        names (`Sequence[str]`): the tasks.
        device (`torch.device`): of the sums.
    """

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names = list(names)
        self.sums = torch.zeros(len(self.names), device=device)
        self.counts = torch.zeros(len(self.names), dtype=torch.long, device=device)

    def add(self, losses: torch.Tensor, mask: torch.Tensor, owner: torch.Tensor, keeps_infinite: bool) -> None:
        """Add a batch's losses `(B, T)` at the tokens of a mask `(B, T)`.

        Args:
            keeps_infinite (`bool`): whether a loss that is not finite counts; without, its task is left out of a batch.
        """
        num_tasks = len(self.names)
        sums = sums_by_task(losses.detach().float(), owner, num_tasks)
        counts = sums_by_task(mask.long(), owner, num_tasks)
        if not keeps_infinite:
            finite = sums.isfinite()
            sums, counts = torch.where(finite, sums, 0.0), torch.where(finite, counts, 0)
        self.sums += sums
        self.counts += counts

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        return {"names": self.names, "sums": self.sums.tolist(), "counts": self.counts.tolist()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same tasks."""
        if state["names"] == self.names:
            self.sums = torch.tensor(state["sums"], device=self.sums.device)
            self.counts = torch.tensor(state["counts"], device=self.counts.device)

    def clear(self) -> None:
        self.sums.zero_()
        self.counts.zero_()
