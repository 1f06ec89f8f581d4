"""Targets, budgets, required tasks and metrics, for every search, against plain loops over all subsets."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from helpers.feature_tables import RUNS, world
from helpers.feature_tables import SIX_NAMES as NAMES
from helpers.feature_tables import six_tasks as tables
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.estimate import SubsetEstimator
from hf_ensemble.select import DataSelector, SelectionProblem, SelectionSettings
from hf_ensemble.store import FeatureTable


@pytest.fixture(scope="module")
def estimator():
    return SubsetEstimator(*tables(), observed_runs=RUNS)


@pytest.fixture(scope="module")
def selector(estimator):
    return DataSelector(estimator, np.eye(len(NAMES)))


def all_subsets(required, free):
    return [(*required, *own) for size in range(len(free) + 1) for own in combinations(free, size) if required or own]


def scores_of(estimator, subsets, targets, metric):
    prediction = estimator.predict_subsets(subsets)
    measure = prediction.loss if metric == "loss" else 1 - prediction.accuracy
    return measure @ np.array([targets.get(name, 0.0) for name in NAMES])


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
@pytest.mark.parametrize(
    "asked",
    [
        {"target": "a"},
        {"target": {"a": 0.5, "d": 2.0}},
        {"target": None},
        {"target": "a", "max_auxiliary": 2},
        {"target": "a", "max_examples": 75},
        {"target": "a", "max_tokens": 160},
        {"target": "a", "include": ["a", "c"], "exclude": ["b"]},
        {"target": ["a", "b"], "include": []},
    ],
    ids=str,
)
def test_exhaustive_is_the_best_of_all_subsets(selector, estimator, asked, metric):
    asked = dict(asked)
    target = asked.pop("target")
    targets = {None: dict.fromkeys(NAMES, 1 / 6), "a": {"a": 1.0}}.get(target if isinstance(target, str | None) else 0)
    targets = targets or (target if isinstance(target, dict) else dict.fromkeys(target, 0.5))
    required = asked.get("include", [] if target is None else list(targets))
    free = [name for name in NAMES if name not in required and name not in asked.get("exclude", ())]
    costs = {"max_auxiliary": 1, "max_examples": estimator.counts, "max_tokens": estimator.token_counts}
    subsets = [
        subset
        for subset in all_subsets(required, free)
        if all(
            sum((cost * np.ones(6))[NAMES.index(name)] for name in subset if name not in targets) <= asked[key]
            for key, cost in costs.items()
            if key in asked
        )
    ]
    scores = scores_of(estimator, subsets, targets, metric)
    found = selector.select(target, "exhaustive", metric=metric, **asked)
    assert scores_of(estimator, [found.tasks], targets, metric)[0] == pytest.approx(scores.min(), abs=1e-7)
    assert found.targets == pytest.approx(targets)
    for method in ("forward", "backward", "random_ensemble"):
        other = selector.select(target, method, metric=metric, **asked)
        assert tuple(sorted(other.tasks)) in {tuple(sorted(subset)) for subset in subsets}
        # Searches end at most where they began, and never below the best.
        score = scores_of(estimator, [other.tasks], targets, metric)[0]
        assert score >= scores.min() - 1e-7
        goal = np.array([targets.get(name, 0.0) for name in NAMES])
        loss = estimator.predict_subsets([other.tasks]).loss[0] @ goal
        assert other.path[-1]["predicted_loss"] == pytest.approx(loss)


def test_backward_stops_where_leaving_out_does_not_help(selector, estimator):
    found = selector.select("a", "backward")
    assert "c" not in found.tasks and "b" in found.tasks
    losses = [step["predicted_loss"] for step in found.path]
    assert losses == sorted(losses, reverse=True)
    for task in found.auxiliary:
        rest = [name for name in found.tasks if name != task]
        assert estimator.predict_subsets([rest]).loss[0, 0] >= losses[-1] - 1e-12
    tight = selector.select("a", "backward", max_auxiliary=1)
    assert len(tight.auxiliary) == 1


def test_the_path_tells_intervals_and_close_calls(selector, estimator):
    first = selector.select("a").path[1]
    assert first["added"] == "b"
    low, high = first["interval"]
    assert low < first["predicted_loss"] < high
    assert first["level"] == pytest.approx(6 / 7)
    prediction = estimator.predict_subsets([["a", name] for name in NAMES[1:]])
    rows = estimator._validation
    features, margin, task = rows.features, rows.margin, rows.task
    losses = np.logaddexp(0, -(margin[task == 0] + prediction.coefficients @ features[task == 0].T))
    apart = losses - losses[0]
    close = apart.mean(1) <= 1.645 * apart.std(1) / np.sqrt((task == 0).sum())
    assert first["close_calls"] == [name for name, near in zip(NAMES[2:], close[1:]) if near]
    # Twins of one task cannot be told apart.
    train, validation = world()
    twin = DataSelector(SubsetEstimator(*(doubled(table) for table in (train, validation))))
    assert twin.select("a").path[1]["close_calls"] == ["e"]
    plain = SubsetEstimator(*(replace(table, num_tokens=None) for table in tables()), observed_runs=RUNS)
    assert DataSelector(plain).select("a", "exhaustive").path[0]["close_calls"]


def doubled(table):
    """With a task e that equals b."""
    rows = np.concatenate([np.arange(len(table.task)), np.flatnonzero(table.task == 1)])
    task = np.concatenate([table.task, np.full((table.task == 1).sum(), 4)])
    ids = np.array([str(index) for index in range(len(rows))])
    return FeatureTable(table.features[rows], table.margin[rows], task, (*table.task_names, "e"), ids)


def test_without_calibration_there_is_no_interval():
    assert DataSelector(SubsetEstimator(*world())).select("a").path[0]["interval"] is None
    assert DataSelector(SubsetEstimator(*world())).select("a").path[0]["level"] is None


def test_baselines_stand_beside_every_result(selector, estimator):
    found = selector.select("a", max_auxiliary=2)
    assert set(found.baselines) == {"all", "alone", "random", "gradient_similarity"}
    assert found.baselines["all"] == pytest.approx(estimator.predict_subsets([NAMES]).loss[0, 0])
    assert found.baselines["alone"] == pytest.approx(estimator.predict_subsets([["a"]]).loss[0, 0])
    assert found.path[-1]["predicted_loss"] <= min(found.baselines["alone"], found.baselines["random"])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"target": "z"}, r"Unknown targets \['z'\]"),
        ({"target": []}, "at least one target"),
        ({"target": {"a": -1.0}}, "weight of the target 'a' has to be a finite number above 0"),
        ({"target": "a", "include": ["z"]}, r"Unknown tasks to include \['z'\]"),
        ({"target": "a", "include": ["b"], "exclude": ["b"]}, "both included and excluded. Drop them from one"),
        ({"target": "a", "exclude": ["a"]}, "Targets are included unless include says otherwise: include=\\[\\]"),
        ({"target": "a", "include": [], "exclude": ["a"], "max_examples": 5}, "None of the tasks .* within the budget"),
        ({"target": "a", "include": [], "exclude": ["a"], "method": "alone"}, "which are excluded"),
        ({"target": "a", "include": [], "exclude": ["a"], "method": "mixture"}, "gives the targets a weight"),
        ({"target": "a", "metric": "f1"}, "metric has to be one of"),
        ({"target": "a", "include": ["a", "b", "c"], "max_auxiliary": 1}, "exceed the budget {'max_auxiliary': 1}"),
        ({"target": None, "exclude": NAMES}, "nothing is left"),
        ({"target": "a", "max_auxiliary": -1}, "max_auxiliary has to be an integer of at least 0 or None, found -1"),
        ({"target": "a", "method": "random_ensemble", "threshold": np.inf}, "threshold has to be a finite number"),
        (
            {"target": "a", "method": "mixture", "metric": "accuracy"},
            "under max_auxiliary alone; found selection_metric='accuracy'",
        ),
        ({"target": "a", "method": "mixture", "max_examples": 10}, "under max_auxiliary alone; found max_examples=10"),
        ({"target": "a", "method": "mixture", "include": ["a", "b"]}, "include requires .'b'."),
    ],
)
def test_what_cannot_be_asked_is_refused(selector, asked, message):
    with pytest.raises(ConfigurationError, match=message):
        selector.select(**asked)


@pytest.mark.parametrize("method", ["forward", "backward", "exhaustive", "random_ensemble", "all", "random"])
def test_a_target_that_is_not_trained_on_is_served_by_others(selector, method):
    found = selector.select("a", method, max_auxiliary=3, include=[], exclude=["a"])
    assert found.tasks and "a" not in found.tasks and "alone" not in found.baselines
    assert found.path[-1]["predicted_loss"] > 0


@pytest.mark.parametrize("method", ["forward", "backward", "exhaustive", "random_ensemble"])
def test_what_nothing_has_to_be_in_keeps_to_the_budget(selector, method):
    # The target is the only task that costs nothing; without it, only the smallest task is within the budget.
    assert selector.select("d", method, max_auxiliary=0, include=[]).tasks == ["d"]
    asked = {"include": [], "exclude": ["d"], "max_examples": 32}
    options = {"threshold": -1.0} if method == "random_ensemble" else {}
    assert selector.select("d", method, **asked, **options).tasks == ["a"]


def test_tokens_have_to_be_known():
    with pytest.raises(ConfigurationError, match="max_tokens needs the number of answer tokens"):
        SelectionProblem(SubsetEstimator(*world()), "a", SelectionSettings(max_tokens=5))


def test_exhaustive_refuses_what_takes_too_long(selector, monkeypatch):
    monkeypatch.setattr("hf_ensemble.select.searches._MAX_SUBSETS", 10)
    with pytest.raises(ConfigurationError, match="5 optional tasks make 32 subsets"):
        selector.select("a", "exhaustive")
    assert len(selector.select("a", "exhaustive", max_auxiliary=1).auxiliary) <= 1


def test_random_ensemble_takes_what_is_below_a_threshold(selector):
    every = selector.select("a", "random_ensemble", num_subsets=60, threshold=1e9)
    assert sorted(every.tasks) == sorted(NAMES)
    none = selector.select("a", "random_ensemble", num_subsets=60, threshold=-1.0)
    assert none.tasks == ["a"]
    assert len(selector.select(None, "random_ensemble", num_subsets=60, threshold=-1.0).tasks) == 1


def test_mixture_keeps_to_the_tasks_that_are_allowed(selector):
    found = selector.select("a", "mixture", exclude=["b"])
    assert "b" not in found.weights and found.tasks[0] == "a"
    assert set(selector.select(["a", "d"], "mixture").targets) == {"a", "d"}


def test_exhaustive_compares_each_subset_with_the_best_once(estimator, monkeypatch):
    compared = []
    spread = estimator.score_spread

    def counted(coefficients, *arguments):
        compared.append(len(coefficients))
        return spread(coefficients, *arguments)

    monkeypatch.setattr(estimator, "score_spread", counted)
    DataSelector(estimator).select("a", "exhaustive")
    assert compared == [2 ** (len(NAMES) - 1)]
