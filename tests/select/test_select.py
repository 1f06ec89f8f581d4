import json
from itertools import combinations

import numpy as np
import pytest

from helpers.feature_tables import world
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.estimate import SubsetEstimator
from hf_ensemble.select import (
    DataSelector,
    Grouping,
    Selection,
    affinity_matrix,
    group_tasks,
    partition_loss,
    random_subsets,
    semidefinite_partition,
    spectral_partition,
)

BLOCKS = np.kron(np.eye(3), np.ones((4, 4))) - 0.3


@pytest.fixture(scope="module")
def selector():
    return DataSelector(SubsetEstimator(*world()))


def test_forward_selection_takes_what_helps_and_stops(selector):
    selection = selector.select("a")
    assert selection.tasks[:2] == ["a", "b"] and "c" not in selection.tasks
    losses = [step["predicted_loss"] for step in selection.path]
    assert losses == sorted(losses, reverse=True)
    final = selector.estimator.predict_subsets([selection.tasks]).loss[0, 0]
    assert final == pytest.approx(losses[-1])
    assert selection.summary.endswith("trust neither their values nor close calls.")
    # No single addition is predicted to help any further.
    for task in set("abcd") - set(selection.tasks):
        assert selector.estimator.predict_subsets([[*selection.tasks, task]]).loss[0, 0] >= losses[-1]


def test_selection_respects_its_budget(selector):
    assert len(selector.select("a", max_auxiliary=1).auxiliary) == 1
    assert selector.select("a", max_auxiliary=0).tasks == ["a"]
    assert len(selector.select("a", method="random_ensemble", max_auxiliary=1, num_subsets=60).auxiliary) <= 1


def test_random_ensemble_scores_are_means_over_subsets(selector):
    selection = selector.select("a", method="random_ensemble", num_subsets=30, subset_size=2, seed=4)
    assert selection.auxiliary[0] == "b" and "c" not in selection.auxiliary
    subsets = random_subsets(3, 2, 30, 4)
    losses = {}
    for row in subsets:
        names = [name for name, held in zip("bcd", row) if held]
        loss = selector.estimator.predict_subsets([["a", *names]]).loss[0, 0]
        for name in names:
            losses.setdefault(name, []).append(loss)
    for name, values in losses.items():
        assert selection.scores[name] == pytest.approx(np.mean(values), rel=1e-5)


def test_results_survive_json(selector, tmp_path):
    selection, grouping = selector.select("a"), selector.group(num_groups=2, affinity_subsets=40)
    selection.save(tmp_path / "selection.json")
    grouping.save(tmp_path / "groups.json")
    assert Selection.load(tmp_path / "selection.json") == selection
    assert Grouping.load(tmp_path / "groups.json") == grouping
    assert "predicted" in json.loads((tmp_path / "selection.json").read_text())["summary"].lower()


def test_unknown_names_are_refused(selector):
    for call, message in [
        (lambda: selector.select("z"), r"Unknown targets \['z'\]"),
        (lambda: selector.select("a", method="best"), "method has to be one of"),
        (lambda: selector.group(method="best"), "method has to be one of"),
        (lambda: selector.group(num_groups=5), "num_groups=5 is more than the 4 tasks"),
        (lambda: selector.group(max_groups=5), "max_groups=5 is more than the 4 tasks"),
        (lambda: selector.select("a", max_auxiliary=5), "max_auxiliary=5 is more than the 4 tasks"),
        (lambda: selector.group(num_groups=0), "num_groups has to be a positive integer or None, found 0"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            call()


def test_random_subsets_are_fair():
    subsets = random_subsets(7, 3, 70, seed=1)
    assert (subsets.sum(1) == 3).all()
    assert np.ptp(subsets.sum(0)) <= 1
    assert (subsets == random_subsets(7, 3, 70, seed=1)).all()
    assert (random_subsets(3, 5, 2) == 1).all()


def test_affinity_equals_a_plain_loop():
    rng = np.random.default_rng(0)
    subsets = (rng.random((25, 6)) < 0.4).astype(float)
    subsets[:, 5] = 0
    scores = rng.normal(size=(25, 6))
    found = affinity_matrix(subsets, scores)
    for i in range(6):
        for j in range(6):
            both = [k for k in range(25) if subsets[k, i] and subsets[k, j]]
            if both:
                assert found[i, j] == pytest.approx(np.mean([scores[k, i] for k in both]))
            else:
                assert np.isnan(found[i, j])


def test_predicted_affinity_prefers_tasks_that_help(selector):
    affinity = selector.affinity(affinity_subsets=40, subset_size=2)
    assert affinity[0, 1] > affinity[0, 2] and affinity[1, 0] > affinity[1, 2]
    assert np.isfinite(affinity).all() and (np.diag(affinity) == 0).all()


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_partitions_find_planted_groups(noise):
    rng = np.random.default_rng(0)
    order = rng.permutation(12)
    affinity = (BLOCKS + noise * rng.normal(size=(12, 12)))[np.ix_(order, order)]
    expected = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])[order]
    for labels in (
        spectral_partition(affinity, 3),
        semidefinite_partition(affinity, 3)[0],
        semidefinite_partition(affinity)[0],
    ):
        assert all((labels[i] == labels[j]) == (expected[i] == expected[j]) for i, j in combinations(range(12), 2))


def test_semidefinite_relaxation_is_feasible_and_no_worse_than_the_planted_partition():
    rng = np.random.default_rng(0)
    affinity = BLOCKS + 0.2 * rng.normal(size=(12, 12))
    _, relaxed = semidefinite_partition(affinity, 3)
    assert np.abs(relaxed.sum(1) - 1).max() < 1e-3 and abs(np.trace(relaxed) - 3) < 1e-3
    assert np.linalg.eigvalsh(relaxed).min() > -1e-4
    planted = np.kron(np.eye(3), np.ones((4, 4)) / 4)
    assert (relaxed * affinity).sum() >= (planted * affinity).sum() - 1e-3


def test_larger_penalty_gives_fewer_groups():
    counts = [len(set(semidefinite_partition(BLOCKS, trace_penalty=p)[0])) for p in (0.01, 1.0, 20.0)]
    assert counts == sorted(counts, reverse=True) and counts[-1] == 1


@pytest.mark.parametrize("method", ["direct", "spectral", "semidefinite"])
def test_grouping_is_a_partition_with_the_least_predicted_loss(selector, method):
    grouping = selector.group(method=method, affinity_subsets=40)
    assert sorted(task for tasks in grouping.groups.values() for task in tasks) == list("abcd")
    assert grouping.group_of("a") == grouping.group_of("b") != grouping.group_of("c")
    loss = partition_loss(selector.estimator, list(grouping.groups.values()))
    assert loss == pytest.approx(min(grouping.predicted_loss.values()))
    assert len(selector.group(num_groups=2, method=method, affinity_subsets=40).groups) == 2
    assert max(map(int, selector.group(max_groups=2, method=method, affinity_subsets=40).predicted_loss)) <= 2


def test_one_task_is_one_group():
    train, validation = world()
    keep = lambda table: type(table)(  # noqa: E731
        table.features[table.task == 0],
        table.margin[table.task == 0],
        table.task[table.task == 0],
        ("a",),
        table.example_id,
    )
    estimator = SubsetEstimator(keep(train), keep(validation))
    assert group_tasks(estimator).groups == {"group_0": ["a"]}
    assert DataSelector(estimator).select("a").tasks == ["a"]
    assert DataSelector(estimator).select("a", method="random_ensemble").tasks == ["a"]
