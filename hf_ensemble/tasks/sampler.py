"""Drawing training rows with a weight per task."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.utils.data import Sampler


class TaskWeightedSampler(Sampler[int]):
    """Draws rows with replacement, each as often as its task's weight says.

    An epoch has sum_k a_k n_k / max_k a_k draws: each row of the heaviest task once, on average. The draws depend on
    the seed and the epoch alone, so that a resumed training sees what an uninterrupted one saw.

    Args:
        tasks (`Sequence[str]`): the task of each row.
        weights (`dict[str, float]`): relative weight of one row of each task.
        seed (`int`): seed of the draws.
    """

    def __init__(self, tasks: Sequence[str], weights: Mapping[str, float], seed: int = 0):
        self.row_weights = torch.tensor([weights[task] for task in tasks], dtype=torch.double)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the dataloader before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return max(1, round(float(self.row_weights.sum() / self.row_weights.max())))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.multinomial(self.row_weights, len(self), replacement=True, generator=generator).tolist()
