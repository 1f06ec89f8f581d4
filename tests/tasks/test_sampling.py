"""How often rows of each task are drawn, and in which order."""

from collections import Counter

import numpy as np
import pytest

from hf_ensemble.errors import ConfigurationError
from hf_ensemble.tasks import TaskWeightedSampler
from hf_ensemble.tasks.sampling import row_weights, rows_per_epoch

COUNTS = {"a": 40, "b": 10, "c": 5}
TASKS = [task for task, count in COUNTS.items() for _ in range(count)]
ONES = dict.fromkeys(COUNTS, 1.0)


@pytest.mark.parametrize(
    ("sampling", "temperature", "given", "shares"),
    [
        ("proportional", 2.0, ONES, [40, 10, 5]),
        ("proportional", 2.0, {"a": 1.0, "b": 3.0, "c": 1.0}, [40, 30, 5]),
        ("uniform", 2.0, ONES, [1, 1, 1]),
        ("uniform", 2.0, {"a": 1.0, "b": 3.0, "c": 1.0}, [1, 3, 1]),
        ("temperature", 2.0, ONES, np.sqrt([40, 10, 5])),
        ("temperature", 1.0, ONES, [40, 10, 5]),
        ("temperature", 1e9, ONES, [1, 1, 1]),
    ],
)
def test_each_rule_draws_its_shares(sampling, temperature, given, shares):
    weights = row_weights(sampling, COUNTS, given, temperature)
    drawn = np.array([weights[task] * count for task, count in COUNTS.items()])
    assert np.allclose(drawn / drawn.sum(), np.array(shares) / np.sum(shares))
    assert sampling == "proportional" or max(weights.values()) == 1.0
    # A subset's shares are those of the rule on the subset alone.
    pair = {task: COUNTS[task] for task in ("b", "c")}
    alone = row_weights(sampling, pair, {task: given[task] for task in pair}, temperature)
    assert alone["b"] / alone["c"] == pytest.approx(weights["b"] / weights["c"])


def test_rules_that_are_none_are_refused():
    with pytest.raises(ConfigurationError, match="task_sampling has to be one of"):
        row_weights("equal", COUNTS, ONES)
    with pytest.raises(ConfigurationError, match="sampling_temperature has to be a finite number above 0, found 0"):
        row_weights("temperature", COUNTS, ONES, 0)


def test_without_replacement_every_row_of_a_task_comes_before_any_comes_again():
    weights = {"a": 0.11, "b": 1.0, "c": 0.3}
    sampler = TaskWeightedSampler(TASKS, weights, seed=3)
    wanted = np.array([weights[task] * count for task, count in COUNTS.items()])
    assert len(sampler) == rows_per_epoch(weights, COUNTS) == round(wanted.sum())
    wanted *= len(sampler) / wanted.sum()
    seen = {task: [] for task in COUNTS}
    for epoch in range(40):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        assert len(rows) == len(sampler) and rows == list(sampler)
        for row in rows:
            seen[TASKS[row]].append(row)
        for task, count, share in zip(COUNTS, COUNTS.values(), wanted):
            used = Counter(seen[task])
            assert max(used.values(), default=0) - (min(used.values()) if len(used) == count else 0) <= 1
            assert abs(len(seen[task]) - share * (epoch + 1)) < 1
    # Another epoch, and another seed, are other rows.
    assert rows != list(TaskWeightedSampler(TASKS, weights, seed=3))
    assert list(TaskWeightedSampler(TASKS, weights, seed=4)) != list(TaskWeightedSampler(TASKS, weights, seed=3))


def test_equal_weights_without_replacement_are_the_union():
    sampler = TaskWeightedSampler(TASKS, ONES)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert sorted(sampler) == list(range(len(TASKS)))


def test_with_replacement_rows_follow_weights_and_epoch():
    weights = {"a": 1.0, "b": 4.0, "c": 0.0}
    sampler = TaskWeightedSampler(TASKS, weights, seed=3, replacement=True)
    assert len(sampler) == 20 and list(sampler) == list(sampler)
    drawn = []
    for epoch in range(100):
        sampler.set_epoch(epoch)
        drawn += list(sampler)
    rows = Counter(drawn)
    tasks = Counter(TASKS[row] for row in drawn)
    assert abs(tasks["a"] / len(drawn) - 0.5) < 0.04 and tasks["c"] == 0
    # Independent draws: some rows of the heaviest task come twice in an epoch, others not.
    assert max(Counter(drawn[:20]).values()) > 1 and len(rows) == 50


def test_drawn_rows_are_sorted_into_batches_of_like_length():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, 5 * len(TASKS)).tolist()
    weights = row_weights("uniform", COUNTS, ONES)
    plain = TaskWeightedSampler(5 * TASKS, weights, seed=1)
    grouped = TaskWeightedSampler(5 * TASKS, weights, seed=1, lengths=lengths, batch_size=4)
    assert sorted(plain) == sorted(grouped) and list(plain) != list(grouped)

    def spread(sampler):
        rows = list(sampler)
        batches = [[lengths[row] for row in rows[start : start + 4]] for start in range(0, len(rows), 4)]
        return np.mean([max(batch) - min(batch) for batch in batches])

    assert spread(grouped) < 0.5 * spread(plain)
