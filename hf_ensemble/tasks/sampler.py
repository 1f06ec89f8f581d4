"""Draws training rows with a weight per task."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from .sampling import rows_per_epoch


class TaskWeightedSampler(Sampler[int]):
    """Draws rows in proportion to the weight of their task.

    An epoch has [`rows_per_epoch`] rows. Without replacement every row of a task is used before any is used again, over
    the ends of epochs too, and after any number of epochs the rows drawn of a task are as many as its weight asks for,
    to within about one. What is drawn depends on seed and epoch only, so a resumed training gets the same rows, and so
    does every process.

    Args:
        tasks (`Sequence[str]`): task of each row.
        weights (`dict[str, float]`): relative weight of a row of each task; rows of weight 0 are not drawn.
        seed (`int`, *optional*, defaults to 0): seed of the draws and their order.
        replacement (`bool`, *optional*, defaults to `False`): whether each row is drawn independently of the others.
        lengths (`Sequence[int]`, *optional*):
            Length of each row. The rows of an epoch are then sorted into batches of like length, as
            `LengthGroupedSampler` of transformers does.
        batch_size (`int`, *optional*, defaults to 1): rows in such a batch.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        weights: Mapping[str, float],
        seed: int = 0,
        replacement: bool = False,
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
    ):
        counts = Counter(tasks)
        self._names = [task for task in counts if weights[task] > 0]
        used = {task: weights[task] for task in self._names}
        self._length = rows_per_epoch(used, counts)
        by_task: dict[str, list[int]] = {task: [] for task in counts}
        for row, task in enumerate(tasks):
            by_task[task].append(row)
        self._rows = [torch.tensor(by_task[task]) for task in self._names]
        drawn = np.array([used[task] * counts[task] for task in self._names])
        self._shares = drawn / drawn.sum()
        self._lengths = lengths
        self._batch_size = batch_size
        self.replacement = replacement
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        generator = self._generator("order", self.epoch)
        rows = self._independent(generator) if self.replacement else self._next()
        rows = rows[torch.randperm(len(rows), generator=generator)].tolist()
        if self._lengths is not None:
            from transformers.trainer_pt_utils import get_length_grouped_indices

            lengths = [self._lengths[row] for row in rows]
            rows = [rows[i] for i in get_length_grouped_indices(lengths, self._batch_size, generator=generator)]
        yield from rows

    def _generator(self, *what: str | int) -> torch.Generator:
        digest = hashlib.blake2b(repr((self.seed, *what)).encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big"))

    def _independent(self, generator: torch.Generator) -> torch.Tensor:
        """Rows of an epoch, each drawn by itself."""
        shares = torch.from_numpy(self._shares)
        drawn = torch.multinomial(shares, len(self), replacement=True, generator=generator)
        counts = torch.bincount(drawn, minlength=len(shares)).tolist()
        parts = [
            rows[torch.randint(len(rows), (count,), generator=generator)] for rows, count in zip(self._rows, counts)
        ]
        return torch.cat(parts)

    def _next(self) -> torch.Tensor:
        """Rows of an epoch: of each task those that come next in an endless sequence of its rows, shuffled anew."""
        starts, ends = self._drawn_until(self.epoch), self._drawn_until(self.epoch + 1)
        parts = []
        for name, rows, start, end in zip(self._names, self._rows, starts.tolist(), ends.tolist()):
            size = len(rows)
            for cycle in range(start // size, -(-end // size)):
                order = rows[torch.randperm(size, generator=self._generator(name, cycle))]
                parts.append(order[max(start - cycle * size, 0) : end - cycle * size])
        return torch.cat(parts)

    def _drawn_until(self, epoch: int) -> np.ndarray:
        """Number of rows of each task that the epochs before this one draw."""
        drawn = np.zeros(len(self._shares), dtype=np.int64)
        for number in range(1, epoch + 1):
            wanted = self._shares * len(self) * number - drawn
            whole = np.maximum(np.floor(wanted + 1e-9), 0).astype(np.int64)
            left = len(self) - int(whole.sum())
            # The rows that are left go to the tasks that lack most, or come off those that have most too many.
            order = np.argsort(whole - wanted if left > 0 else wanted - whole + 2.0 * (whole == 0), kind="stable")
            whole[order[: abs(left)]] += np.sign(left)
            drawn += whole
        return drawn
