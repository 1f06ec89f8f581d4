"""Random subsets of tasks."""

import numpy as np


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
