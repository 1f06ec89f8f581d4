"""Samples training rows with a weight per task."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.utils.data import Sampler


class TaskWeightedSampler(Sampler[int]):
    """Samples rows with replacement, in proportion to the weight of their task.

    An epoch has sum_k a_k n_k / max_k a_k rows, so each row of the task with the largest weight is sampled once on
    average. Samples depend on seed and epoch only, so a resumed training gets the same rows.

    Args:
        tasks (`Sequence[str]`): task of each row.
        weights (`dict[str, float]`): relative weight of a row of each task.
        seed (`int`, *optional*, defaults to 0): seed of the samples.
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
