"""A sample of rows that searches among many choices look at; what they come to is predicted from all rows."""

import numpy as np

from ..tasks.sampling import systematic_positions


def sampled_rows(task: np.ndarray, margin: np.ndarray, most: int, seed: int = 0) -> np.ndarray:
    """At most `most` rows, ascending, as many of each task as there are or an equal number; at least one of each.

    Of each task it is a systematic sample of the rows in the order of their margins: each row is drawn with the same
    probability, and the margins of the sample are spread as those of all rows, so that their mean loss is almost that
    of all rows.

    Args:
        task (`np.ndarray` of shape `(n,)`): index of each row's task, ascending; every task has rows.
        margin (`np.ndarray` of shape `(n,)`): margins at the linearization point.
        most (`int`): number of rows to draw, if there are more.
        seed (`int`, *optional*, defaults to 0): seed of the draws.
    """
    counts = np.bincount(task)
    quota = _equal_quota(counts, most)
    edges = np.concatenate([[0], np.cumsum(counts)])
    generator = np.random.default_rng(seed)
    drawn = []
    for first, last, start in zip(edges[:-1], edges[1:], generator.random(len(counts))):
        count, own = int(last - first), min(quota, int(last - first))
        places = systematic_positions(count, own, start)
        order = np.argsort(margin[first:last], kind="stable") if own < count else np.arange(count)
        drawn.append(first + np.sort(order[places]))
    return np.concatenate(drawn)


def _equal_quota(counts: np.ndarray, most: int) -> int:
    """The largest number of rows of a task so that all tasks together have no more than `most`, or one."""
    low, high = 1, int(counts.max())
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(counts, middle).sum() <= most else (low, middle - 1)
    return low
