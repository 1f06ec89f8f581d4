"""Random subsets of tasks."""

from collections.abc import Sequence
from itertools import cycle

import numpy as np

from .._settings import check_at_least
from ..errors import ConfigurationError

# Attempts to draw a new subset before a size counts as exhausted.
_TRIES = 50


def random_subsets(num_tasks: int, size: int, count: int, seed: int = 0) -> np.ndarray:
    """Subsets of one size as 0/1 rows `(count, num_tasks)`, with each task about equally often.

    Subsets are dealt from a shuffled deck of all tasks, so every task appears once before any repeats.

    Raises:
        `ConfigurationError`: for a size, number or seed that is none.
    """
    check_at_least("The size of a subset", size, 0)
    check_at_least("The number of subsets", count, 0)
    check_at_least("seed", seed, 0)
    generator = np.random.default_rng(seed)
    size = min(size, num_tasks)
    subsets = np.zeros((count, num_tasks))
    deck: list[int] = []
    for row in range(count):
        while subsets[row].sum() < size:
            if not deck:
                deck = generator.permutation(num_tasks).tolist()
            # Skip tasks that the subset already contains.
            card = next((i for i in deck if not subsets[row, i]), None)
            if card is None:
                deck = generator.permutation(num_tasks).tolist()
                continue
            deck.remove(card)
            subsets[row, card] = 1.0
    return subsets


def mixed_subsets(num_tasks: int, count: int, sizes: Sequence[int] | None = None, seed: int = 0) -> np.ndarray:
    """Distinct random subsets as 0/1 rows, cycling through several sizes.

    Args:
        num_tasks (`int`): number of tasks to draw from.
        count (`int`): number of subsets; fewer are returned if there are not that many.
        sizes (`Sequence[int]`, *optional*):
            Sizes to cycle through. Logarithmically spaced from 1 to all tasks by default.
        seed (`int`, *optional*, defaults to 0): seed of the draws.

    Raises:
        `ConfigurationError`: for sizes, a number or a seed that are none.
    """
    check_at_least("num_subsets", count, 1)
    check_at_least("seed", seed, 0)
    if sizes is not None and (isinstance(sizes, str) or not isinstance(sizes, Sequence) or not sizes):
        raise ConfigurationError(f"Expected sizes of subsets as a list of integers, found {sizes!r}.")
    for size in sizes or ():
        check_at_least("Each size of a subset", size, 1)
    if sizes is None:
        sizes = sorted({int(round(size)) for size in np.geomspace(1, num_tasks, 8)})
    generator = np.random.default_rng(seed)
    drawn: list[tuple[int, ...]] = []
    exhausted: set[int] = set()
    for size in cycle(sizes):
        if len(drawn) == count or len(exhausted) == len(set(sizes)):
            break
        for _ in range(_TRIES):
            subset = tuple(sorted(generator.choice(num_tasks, min(size, num_tasks), replace=False).tolist()))
            if subset not in drawn:
                drawn.append(subset)
                break
        else:
            exhausted.add(size)
    subsets = np.zeros((len(drawn), num_tasks))
    for row, subset in enumerate(drawn):
        subsets[row, list(subset)] = 1.0
    return subsets


def calibration_subsets(names: Sequence[str], count: int, seed: int = 0) -> list[list[str]]:
    """Subsets to fine-tune on for calibration: all tasks first, then random fifths that cycle through the tasks.

    Args:
        names (`Sequence[str]`): the tasks.
        count (`int`): number of subsets.
        seed (`int`, *optional*, defaults to 0): seed of the draws.
    """
    few = max(1, round(len(names) / 5))
    drawn = random_subsets(len(names), few, max(0, count - 1), seed)
    subsets = [[name for name, held in zip(names, row) if held] for row in drawn]
    return [list(names), *subsets][:count]
