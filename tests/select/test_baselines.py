"""Simpler ways to choose, against plain loops."""

import sys

import numpy as np
import pytest

from helpers.feature_tables import SIX_NAMES as NAMES
from helpers.feature_tables import six_tasks as tables
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.estimate import ObservedRun, SubsetEstimator
from hf_ensemble.select import DataSelector, SelectionProblem, mean_cosines
from hf_ensemble.select.baselines import (
    all_tasks,
    learned_selection,
    random_selection,
    similarity_selection,
    targets_alone,
    transport_selection,
)


@pytest.fixture(scope="module")
def world():
    return tables()


@pytest.fixture(scope="module")
def problem(world):
    return SelectionProblem(SubsetEstimator(*world), "a")


def test_cosines_are_means_over_pairs(world):
    train, validation = world
    found = mean_cosines(train, validation)
    for k, j in ((0, 1), (2, 0), (5, 5)):
        cosines = [
            x @ y / np.linalg.norm(x) / np.linalg.norm(y)
            for x in train.features[train.task == k]
            for y in validation.features[validation.task == j]
        ]
        assert found[k, j] == pytest.approx(np.mean(cosines), abs=1e-6)


def test_the_most_similar_tasks_are_taken(problem, world):
    similarity = mean_cosines(*world)
    found = similarity_selection(problem, 3, similarity)
    assert found.tasks[0] == "a" and set(found.auxiliary) == {"b", "e", "d"} and found.auxiliary[0] == "b"
    assert found.scores["b"] == pytest.approx(-similarity[1, 0])
    assert found.settings["size"] == 3
    loss = problem.estimator.predict_subsets([found.tasks]).loss[0, 0]
    assert found.path[-1]["predicted_loss"] == pytest.approx(loss)


def test_everything_nothing_and_anything(problem):
    assert sorted(all_tasks(problem).tasks) == sorted(NAMES)
    assert targets_alone(problem).tasks == ["a"]
    drawn = [tuple(random_selection(problem, 2, seed).auxiliary) for seed in range(6)]
    assert all(len(own) == 2 and "a" not in own for own in drawn) and len(set(drawn)) > 1
    assert drawn[0] == tuple(random_selection(problem, 2, 0).auxiliary)
    everyone = SelectionProblem(problem.estimator)
    assert sorted(targets_alone(everyone).tasks) == sorted(NAMES)
    excluded = SelectionProblem(problem.estimator, "a", exclude=["b"])
    assert "b" not in all_tasks(excluded).tasks


def test_transport_prefers_rows_like_the_targets(problem, world):
    pytest.importorskip("ot")
    found = transport_selection(problem, 2, *world)
    assert set(found.auxiliary) == {"b", "e"}
    # The derivative by a task's share is that of the transport cost, up to a constant.
    from ot import emd2

    train, validation = world
    rows, goal = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train.features, validation.features))
    cost = (1 - rows @ goal[validation.task == 0].T).astype(np.float64)
    share = np.full(len(cost), 1 / len(cost))

    def moved(name, step=1e-7):
        mine = train.task == NAMES.index(name)
        other = share.copy()
        other[mine] += step / mine.sum()
        other -= step / len(cost)
        return (emd2(other / other.sum(), np.full(cost.shape[1], 1 / cost.shape[1]), cost) - base) / step

    base = emd2(share, np.full(cost.shape[1], 1 / cost.shape[1]), cost)
    slopes = {name: moved(name) for name in "bcdef"}
    assert sorted(slopes, key=slopes.get) == sorted(found.scores, key=found.scores.get)


def test_transport_says_what_it_needs(problem, world, monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ConfigurationError, match="pip install POT"):
        transport_selection(problem, 2, *world)


def test_a_learned_predictor_finds_what_lowers_the_loss(problem):
    rng = np.random.default_rng(0)
    runs = []
    for _ in range(60):
        held = [name for name in NAMES if rng.random() < 0.5] or ["a"]
        loss = 1.0 - 0.2 * ("d" in held) - 0.1 * ("f" in held) + 0.3 * ("b" in held)
        runs.append(ObservedRun(dict.fromkeys(held, 1.0), {"a": loss}))
    assert set(learned_selection(problem, 2, runs).auxiliary) == {"d", "f"}


def test_baselines_are_methods_of_the_selector(world):
    similarity = mean_cosines(*world)
    selector = DataSelector(SubsetEstimator(*world), similarity)
    size = len(selector.select("a").auxiliary)
    for method, expected in (("all", 5), ("alone", 0), ("random", size), ("gradient_similarity", size)):
        found = selector.select("a", method)
        assert found.method == method and len(found.auxiliary) == expected
    assert len(selector.select("a", "random", max_auxiliary=3, seed=2).auxiliary) == 3
    with pytest.raises(ConfigurationError, match="Create the selector with DataSelector.from_store"):
        DataSelector(selector.estimator).select("a", "gradient_similarity")
