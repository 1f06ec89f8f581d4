"""Random subsets of tasks."""

from collections.abc import Sequence
from itertools import cycle

import numpy as np

# Draws for a subset that is new, before a size counts as exhausted.
_TRIES = 50


def random_subsets(num_tasks: int, size: int, count: int, seed: int = 0) -> np.ndarray:
    """Subsets of one size as 0/1 rows `(count, num_tasks)`, each task about equally often.

    Consecutive subsets are dealt from one shuffled deck of all tasks, so that no task is left out while others repeat.
    """
    generator = np.random.default_rng(seed)
    size = min(size, num_tasks)
    subsets = np.zeros((count, num_tasks))
    deck: list[int] = []
    for row in range(count):
        while subsets[row].sum() < size:
            if not deck:
                deck = generator.permutation(num_tasks).tolist()
            # A card that the subset holds already goes to the bottom.
            card = next((i for i in deck if not subsets[row, i]), None)
            if card is None:
                deck = generator.permutation(num_tasks).tolist()
                continue
            deck.remove(card)
            subsets[row, card] = 1.0
    return subsets


def mixed_subsets(num_tasks: int, count: int, sizes: Sequence[int] | None = None, seed: int = 0) -> np.ndarray:
    """Different random subsets of several sizes in turn as 0/1 rows, `count` of them or as many as there are.

    Args:
        num_tasks (`int`): tasks to draw from.
        count (`int`): subsets.
        sizes (`Sequence[int]`, *optional*):
            Sizes to take in turn; about evenly spaced on a logarithmic scale from 1 to all tasks by default.
        seed (`int`, *optional*, defaults to 0): seed of the draws.
    """
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
    """What to fine-tune on to calibrate estimates: all tasks first, then random few, each task at most once in turn.

    Args:
        names (`Sequence[str]`): the tasks.
        count (`int`): subsets.
        seed (`int`, *optional*, defaults to 0): seed of the draws.
    """
    few = max(1, round(len(names) / 5))
    drawn = random_subsets(len(names), few, max(0, count - 1), seed)
    subsets = [[name for name, held in zip(names, row) if held] for row in drawn]
    return [list(names), *subsets][:count]
