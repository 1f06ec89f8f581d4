"""An adapter for each task, trained on it alone, among the choices of mixtures."""

import numpy as np
import pytest

from hf_ensemble.estimate import ObservedRun, SubsetEstimator
from hf_ensemble.select import DataSelector
from hf_ensemble.store import FeatureTable

SIZE = 10
NAMES = tuple(f"task_{index}" for index in range(SIZE))
OPTIONS = {"method": "mixtures", "compute_budget": 1.0, "has_baseline": False, "affinity_subsets": 5}


@pytest.fixture(scope="module")
def selector():
    """Of tasks that contradict each other, with few rows to choose by."""
    rng = np.random.default_rng(0)
    wishes = np.linalg.qr(rng.normal(size=(40, SIZE)))[0].T
    wishes = 2 * (wishes - wishes.sum(0) / 5)

    def table(count):
        task = np.repeat(np.arange(SIZE), count)
        features = rng.normal(size=(len(task), 40)) / np.sqrt(40) + wishes[task]
        ids = np.array([str(index) for index in range(len(task))])
        return FeatureTable(features.astype(np.float32), np.zeros(len(task), dtype=np.float32), task, NAMES, ids)

    run = ObservedRun(dict.fromkeys(NAMES, 1.0), dict.fromkeys(NAMES, 0.6))
    return DataSelector(SubsetEstimator(table(12), table(8), observed_runs=[run]))


def are_each_alone(grouping):
    return sorted(map(dict, grouping.mixtures.values()), key=list) == [{name: 1.0} for name in NAMES]


def test_it_is_known_without_a_search_and_has_no_optimism(selector):
    # More adapters than a search looks at.
    grouping = selector.group(None, **OPTIONS)
    assert are_each_alone(grouping) and grouping.cost == pytest.approx(1.0)
    (taken,) = [point for point in grouping.cost_curve if point["expected_loss"] == grouping.expected_loss]
    assert taken["optimism"] == 0 and taken["num_groups"] == SIZE
    assert taken["predicted_loss"] == pytest.approx(selector.estimator.predict(np.eye(SIZE)).loss.diagonal().mean())


def test_not_where_there_may_be_fewer_adapters_or_they_cost_too_much(selector):
    alone = selector.group(None, **OPTIONS)
    fewer = selector.group(None, max_groups=4, **OPTIONS)
    assert len(fewer.groups) <= 4 and fewer.expected_loss > alone.expected_loss
    dear = selector.group(None, **{**OPTIONS, "compute_budget": 1.5, "has_baseline": True})
    assert dear.cost <= 1.5 and len(dear.groups) < SIZE


def test_where_one_of_them_is_trained_the_others_are_left(selector):
    losses = dict(zip(NAMES, selector.estimator.predict_subsets([{"task_3": 1.0}]).loss[0].tolist()))
    grouping = selector.group(None, trained={"group_0": ObservedRun({"task_3": 1.0}, losses)}, **OPTIONS)
    assert grouping.groups["group_0"] == ["task_3"] and grouping.cost == pytest.approx(1.0)
    assert are_each_alone(grouping)


def test_of_targets_each_of_these_has_one(selector):
    grouping = selector.group(None, targets=["task_0", "task_1"], **OPTIONS)
    found = [point for point in grouping.cost_curve if (point["num_groups"], point["optimism"]) == (2, 0)]
    assert any(point["cost"] == pytest.approx(0.2) for point in found)
