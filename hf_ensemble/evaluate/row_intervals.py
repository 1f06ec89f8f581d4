"""How far figures of a system would move with another sample of rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import binomtest

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
        mean (`dict[str, tuple[float, float]]`): of the mean over the tasks that have the figure.
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
    interval, which does not vanish where all rows are right.

    Args:
        systems (`dict[str, dict[str, RowScores]]`): scores of the same rows by system and task.
        reference (`str`, *optional*): the system that the others are compared with; none by default.
        level (`float`, *optional*, defaults to 0.95): of the intervals.
        num_samples (`int`, *optional*, defaults to 2000): number of bootstrap samples.
        seed (`int`, *optional*, defaults to 0): of the samples.

    Returns:
        `dict[str, SystemIntervals]`: by system.
    """
    compared = systems.get(reference or "", {})
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
        samples = _sampled_means(np.stack(list(own.values()), axis=1), num_samples, [seed, number])
        drawn |= dict(zip(own, samples.T))
    tails = [(1 - level) / 2, (1 + level) / 2]

    def interval(samples: np.ndarray) -> Interval:
        low, high = np.quantile(samples, tails).tolist()
        return low, high

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
                is_share = bool(np.isin(rows, (0.0, 1.0)).all())
                intervals[task][name] = _share_interval(rows, level) if is_share else interval(drawn[key])
                if task in compared and other in values and system != reference:
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
            mean={name: interval(np.mean([drawn[key] for key in keys], axis=0)) for name, keys in means.items()},
            differences={task: own for task, own in differences.items() if own},
            mean_difference=mean_difference,
        )
    return found


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
