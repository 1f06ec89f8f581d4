"""How far figures of a system would move with another sample of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import binomtest

from .._settings import check_at_least, check_number, check_one_of
from ..errors import ScoringError
from .scores import RowScores

_LEVEL = 0.95
_NUM_SAMPLES = 2000
# Counts of a bootstrap that are held at once, 80 megabytes.
_HELD = 10_000_000

Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """A figure of a system minus that of the reference, on the same rows.

    Args:
        value (`float`): the difference.
        interval (`tuple[float, float]`): its interval.
    """

    value: float
    interval: Interval

    @property
    def is_clear(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.interval[0] > 0 or self.interval[1] < 0


@dataclass(frozen=True)
class SystemIntervals:
    """Intervals of a system's figures over rows, and its paired differences from a reference.

    Figures that are no means over rows have none.

    Args:
        tasks (`dict[str, dict[str, tuple[float, float]]]`): by task and figure (`"loss"`, `"accuracy"`, metrics).
        mean (`dict[str, tuple[float, float]]`): of the mean over the tasks that have the figure, each counted once.
        differences (`dict[str, dict[str, Difference]]`): by task and figure; empty for the reference.
        mean_difference (`dict[str, Difference]`): of the means.
    """

    tasks: dict[str, dict[str, Interval]]
    mean: dict[str, Interval]
    differences: dict[str, dict[str, Difference]] = field(default_factory=dict)
    mean_difference: dict[str, Difference] = field(default_factory=dict)


def system_intervals(
    systems: Mapping[str, Mapping[str, RowScores]],
    reference: str | None = None,
    level: float = _LEVEL,
    num_samples: int = _NUM_SAMPLES,
    seed: int = 0,
) -> dict[str, SystemIntervals]:
    """Bootstrap intervals over the rows of each task.

    Every sample draws as many rows of a task as it has, with replacement, and the same ones for all systems, so that
    differences are paired. The mean over tasks is that of the tasks' samples. A share of right rows gets Wilson's
    interval, which does not vanish where all rows are right, and a mean of shares the one that follows from theirs
    (MOVER, [Zou and Donner 2008](https://doi.org/10.1002/sim.3095)): of a single task, the same.

    Args:
        systems (`dict[str, dict[str, RowScores]]`): scores of the same rows by system and task.
        reference (`str`, *optional*): the system that the others are compared with, one of these; none by default.
        level (`float`, *optional*, defaults to 0.95): of the intervals.
        num_samples (`int`, *optional*, defaults to 2000): number of bootstrap samples.
        seed (`int`, *optional*, defaults to 0): of the samples.

    Returns:
        `dict[str, SystemIntervals]`: by system.

    Raises:
        `ConfigurationError`: for an unknown reference, and for arguments out of range.
        `ScoringError`: for systems whose scores are not of the same number of rows.
    """
    if reference is not None:
        check_one_of("reference", reference, list(systems))
    check_number("level", level, 0, 1, above=True)
    check_at_least("num_samples", num_samples, 1)
    tasks = dict.fromkeys(task for by_task in systems.values() for task in by_task)
    values = {
        (system, task, name): rows
        for system, by_task in systems.items()
        for task, own in by_task.items()
        for name, rows in own.figures().items()
    }
    drawn: dict[tuple[str, str, str], np.ndarray] = {}
    for number, task in enumerate(tasks):
        own = {key: rows for key, rows in values.items() if key[1] == task}
        sizes = {key[0]: len(rows) for key, rows in own.items()}
        if len(set(sizes.values())) > 1:
            raise ScoringError(f"Expected scores of the same rows of {task!r} for every system, found numbers {sizes}.")
        samples = _sampled_means(np.stack(list(own.values()), axis=1), num_samples, [seed, number])
        drawn |= dict(zip(own, samples.T))
    tails = [(1 - level) / 2, (1 + level) / 2]

    def interval(samples: np.ndarray) -> Interval:
        low, high = np.quantile(samples, tails).tolist()
        return low, high

    shares = {key: _share_interval(rows, level) for key, rows in values.items() if _is_share(rows)}

    def mean_interval(keys: Sequence[tuple[str, str, str]]) -> Interval:
        if all(key in shares for key in keys):
            return _mean_of_shares([float(values[key].mean()) for key in keys], [shares[key] for key in keys])
        return interval(np.mean([drawn[key] for key in keys], axis=0))

    found = {}
    for system, by_task in systems.items():
        intervals: dict[str, dict[str, Interval]] = {}
        differences: dict[str, dict[str, Difference]] = {}
        means: dict[str, list[tuple[str, str, str]]] = {}
        for task, own in by_task.items():
            intervals[task], differences[task] = {}, {}
            for name, rows in own.figures().items():
                key, other = (system, task, name), (reference, task, name)
                means.setdefault(name, []).append(key)
                intervals[task][name] = shares[key] if key in shares else interval(drawn[key])
                if other in values and system != reference:
                    value = float(rows.mean() - values[other].mean())
                    differences[task][name] = Difference(value, interval(drawn[key] - drawn[other]))
        mean_difference = {}
        for name, keys in means.items():
            others = [(reference, *key[1:]) for key in keys]
            if system != reference and all(other in values for other in others):
                samples = np.mean([drawn[key] - drawn[other] for key, other in zip(keys, others)], axis=0)
                value = float(np.mean([values[key].mean() - values[other].mean() for key, other in zip(keys, others)]))
                mean_difference[name] = Difference(value, interval(samples))
        found[system] = SystemIntervals(
            tasks=intervals,
            mean={name: mean_interval(keys) for name, keys in means.items()},
            differences={task: own for task, own in differences.items() if own},
            mean_difference=mean_difference,
        )
    return found


def _is_share(rows: np.ndarray) -> bool:
    return bool(np.isin(rows, (0.0, 1.0)).all())


def _mean_of_shares(shares: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """Of the mean of independent shares: the squared distances to the limits add up, as variances do."""
    mean, limits = float(np.mean(shares)), np.array(intervals)
    below, above = np.linalg.norm(np.array(shares)[:, None] - limits, axis=0) / len(shares)
    return mean - float(below), mean + float(above)


def _sampled_means(values: np.ndarray, num_samples: int, seed: list[int]) -> np.ndarray:
    """Means of `(n, k)` values over bootstrap samples of the `n` rows, `(num_samples, k)`."""
    generator, size = np.random.default_rng(seed), len(values)
    at_once = max(_HELD // size, 1)
    parts = []
    for start in range(0, num_samples, at_once):
        count = min(at_once, num_samples - start)
        chosen = generator.integers(size, size=(count, size)) + size * np.arange(count)[:, None]
        counts = np.bincount(chosen.ravel(), minlength=count * size).reshape(count, size)
        parts.append(counts @ values / size)
    return np.concatenate(parts)


def _share_interval(rows: np.ndarray, level: float) -> Interval:
    found = binomtest(int(rows.sum()), len(rows)).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)
