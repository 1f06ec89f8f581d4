"""Partitions by direct search."""

from itertools import product

import numpy as np
import pytest

from helpers.feature_tables import world
from hf_ensemble.estimate import SubsetEstimator
from hf_ensemble.select import DataSelector, partition_loss
from hf_ensemble.select.groups.direct_search import improve_partition, merge_path
from hf_ensemble.select.groups.group_losses import GroupLosses
from hf_ensemble.select.groups.partition import canonical


def pairwise(seed, size=7):
    """Losses of a group: each task loses or gains by each companion, and directions that say nothing of it."""
    generator = np.random.default_rng(seed)
    effect = generator.normal(size=(size, size))
    return (lambda mixtures: mixtures @ effect / 2 + 5.0), generator.normal(size=(size, 3))


def least(losses, size, groups=None):
    """Over all partitions."""
    labels = {tuple(canonical(np.array(row))) for row in product(range(size), repeat=size)}
    return min(losses.of_partition(np.array(row)) for row in labels if groups is None or max(row) + 1 == groups)


@pytest.mark.parametrize("seed", range(4))
def test_the_search_ends_close_to_the_best_of_all_partitions(seed):
    predict, directions = pairwise(seed, 6)
    losses = GroupLosses(predict)
    path = merge_path(losses, directions, 6)
    for labels, loss in path:
        count = labels.max() + 1
        assert losses.of_partition(labels) == pytest.approx(loss)
        end = improve_partition(losses, labels, directions, 6)
        found, best = losses.of_partition(end), least(losses, 6, count)
        assert end.max() + 1 == count and best - 1e-9 <= found <= loss + 1e-9
    assert min(
        losses.of_partition(improve_partition(losses, labels, directions, 6)) for labels, _ in path
    ) == pytest.approx(least(losses, 6), rel=0.03)


def test_each_merge_is_the_cheapest():
    predict, directions = pairwise(1)
    losses = GroupLosses(predict)
    path = merge_path(losses, directions, 7)
    assert [labels.max() + 1 for labels, _ in path] == list(range(7, 0, -1))
    for (before, _), (_, loss) in zip(path, path[1:]):
        merges = [
            canonical(np.where(before == second, first, before))
            for first in range(before.max() + 1)
            for second in range(first + 1, before.max() + 1)
        ]
        assert loss == pytest.approx(min(losses.of_partition(labels) for labels in merges))


def test_many_groups_are_merged_several_at_once():
    predict, directions = pairwise(3, 120)
    calls = []
    losses = GroupLosses(lambda mixtures: calls.append(len(mixtures)) or predict(mixtures))
    path = merge_path(losses, directions, 5, min_groups=7)
    assert [labels.max() + 1 for labels, _ in path] == list(range(120, 6, -1))
    assert len(calls) < 115
    for labels, loss in path[::10]:
        assert losses.of_partition(labels) == pytest.approx(loss)
    assert path[-1][1] < path[0][1]


def test_nothing_is_left_to_gain_by_a_move():
    predict, directions = pairwise(2)
    losses = GroupLosses(predict)
    end = improve_partition(losses, np.array([0, 1, 2, 0, 1, 2, 0]), directions, 7)
    for task, group in product(range(7), range(3)):
        other = end.copy()
        other[task] = group
        if len(set(other.tolist())) == 3:
            assert losses.of_partition(other) >= losses.of_partition(end) * (1 - 1e-5)


def test_swaps_help_where_moves_cannot():
    """Four tasks in pairs, groups of unequal size forbidden by their loss."""
    friends = np.array([0, 0, 1, 1])

    def predict(mixtures):
        same = friends[:, None] == friends
        return np.where(mixtures.sum(1, keepdims=True) == 2, 1.0, 9.0) - 0.5 * (mixtures @ same > 1)

    losses = GroupLosses(predict)
    assert improve_partition(losses, np.array([0, 1, 0, 1]), np.eye(4), 4).tolist() == [0, 0, 1, 1]


def test_groups_are_predicted_once():
    calls = []

    def predict(mixtures):
        calls.append(len(mixtures))
        return np.ones_like(mixtures)

    losses = GroupLosses(predict)
    masks = np.eye(4, dtype=bool)
    assert losses([masks[0], masks[1], masks[0]]).tolist() == [1, 1, 1] and calls == [2]
    assert losses([masks[1] | masks[2], masks[1]]).tolist() == [2, 1] and calls == [2, 1]


@pytest.mark.parametrize("num_candidates", [3, 30])
def test_planted_groups_are_found(num_candidates):
    """Thirty tasks along five directions: tasks of one direction teach each other."""
    generator = np.random.default_rng(0)
    kind = generator.permutation(np.repeat(np.arange(5), 6))
    directions = np.eye(5)[kind] + 0.05 * generator.normal(size=(30, 5))

    def predict(mixtures):
        shared = mixtures @ (kind[:, None] == kind)
        return 2.0 - np.log1p(shared) + 0.1 * (mixtures.sum(1, keepdims=True) - shared)

    losses = GroupLosses(predict)
    path = merge_path(losses, directions, num_candidates)
    best = min(path, key=lambda step: step[1])[0]
    assert np.array_equal(best, canonical(kind))
    start = canonical(generator.permutation(kind))
    assert np.array_equal(improve_partition(losses, start, directions, num_candidates), canonical(kind))
    assert start.tolist() != canonical(kind).tolist()


def test_grouping_is_no_worse_than_any_clustering():
    selector = DataSelector(SubsetEstimator(*world()))
    for count in (None, 2, 3):
        own = selector.group(count, affinity_subsets=40)
        for method in ("spectral", "semidefinite"):
            other = selector.group(count, method, affinity_subsets=40)
            assert partition_loss(selector.estimator, list(own.groups.values())) <= 1e-9 + partition_loss(
                selector.estimator, list(other.groups.values())
            )
    assert selector.group(affinity_subsets=40) == selector.group(affinity_subsets=40)


def test_a_group_has_to_be_worth_its_cost():
    selector = DataSelector(SubsetEstimator(*world()))
    counts = [len(selector.group(affinity_subsets=40, group_cost=cost).groups) for cost in (0.0, 0.02, 10.0)]
    assert counts == sorted(counts, reverse=True) and counts[0] > 1 and counts[-1] == 1
    assert "cost" in selector.group(affinity_subsets=40, group_cost=10.0).summary
