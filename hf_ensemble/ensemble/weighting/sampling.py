"""Which rows and answer tokens stand for all of them: pure functions of counts and a seed."""

from collections.abc import Sequence

import numpy as np


def spread_sample(total: int, size: int | None, seed: int) -> list[int]:
    """`size` of `total` positions, ascending: one at random from each of `size` equal stretches; all by default."""
    if size is None or size >= total:
        return list(range(total))
    bounds = np.arange(size + 1) * total // size
    return np.random.default_rng(seed).integers(bounds[:-1], bounds[1:]).tolist()


def tokens_per_row(counts: Sequence[int], budget: int) -> list[int]:
    """How many answer tokens to keep of each row, at least one, `budget` at most in all; `len(counts) <= budget`.

    Short answers are kept whole, and long ones are cut to the same length.
    """
    if sum(counts) <= budget:
        return list(counts)
    low, high = 1, max(counts)
    # The largest common cap that keeps no more than the budget.
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(count, middle) for count in counts) <= budget:
            low = middle
        else:
            high = middle - 1
    kept = [min(count, low) for count in counts]
    rest = budget - sum(kept)
    for row, count in enumerate(counts):
        if rest and count > low:
            kept[row], rest = low + 1, rest - 1
    return kept


def evenly_spaced(total: int, size: int) -> list[int]:
    """`size` of `total` positions, each in the middle of one of `size` equal stretches."""
    return [(2 * i + 1) * total // (2 * size) for i in range(size)]
