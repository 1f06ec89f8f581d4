"""Where there are many rows, searches look at some of them, and what they come to is predicted from all."""

import numpy as np
import pytest

from helpers.feature_tables import RUNS, SIX_NAMES, six_tasks
from hf_ensemble.estimate import ObservedRun, SubsetEstimator
from hf_ensemble.select import DataSelector, predicted_losses, sampled_search, searches
from hf_ensemble.store import FeatureTable


@pytest.fixture(scope="module")
def selector():
    rng = np.random.default_rng(1)
    tasks, rows, dim = 12, 120, 16
    topics = rng.normal(size=(3, dim))
    means = 0.5 * topics[np.arange(tasks) % 3] + 0.15 * rng.normal(size=(tasks, dim))
    names = tuple(f"t{task}" for task in range(tasks))

    def table():
        task = np.repeat(np.arange(tasks), rows)
        features = (rng.normal(size=(len(task), dim)) + means[task]).astype(np.float32)
        return FeatureTable(features, rng.normal(size=len(task)), task, names, np.arange(len(task)).astype(str))

    train, validation = table(), table()
    base = np.bincount(validation.task, np.logaddexp(0, -validation.margin)) / rows
    run = ObservedRun(dict.fromkeys(names, 1.0), dict(zip(names, (0.9 * base).tolist())))
    return DataSelector(SubsetEstimator(train, validation, observed_runs=[run]))


@pytest.mark.parametrize("method", ["forward", "backward"])
@pytest.mark.parametrize("asked", [{}, {"max_auxiliary": 2, "exclude": ["t3"]}])
def test_a_search_in_samples_reports_what_all_rows_say(selector, method, asked):
    exact = selector.select("t0", method, **asked)
    found = selector.select("t0", method, search_rows=500, **asked)
    assert found.tasks[0] == "t0" and set(found.tasks) <= set(selector.estimator.task_names) - set(
        asked.get("exclude", [])
    )
    assert len(found.tasks) <= 1 + asked.get("max_auxiliary", 12)
    # What is reported is the prediction of what is chosen, from all rows.
    column = selector.estimator.task_names.index("t0")
    predicted = selector.estimator.predict_subsets([found.tasks]).loss[0, column]
    assert found.path[-1]["predicted_loss"] == pytest.approx(predicted, abs=1e-7)
    assert found.path[-1]["interval"] == pytest.approx(exact.path[-1]["interval"], rel=0.1)
    chosen = []
    for entry in found.path:
        names = entry.get("added", entry.get("removed")).split(", ")
        chosen = chosen + names if "added" in entry else [name for name in chosen if name not in names]
        loss = selector.estimator.predict_subsets([chosen]).loss[0, column]
        assert entry["predicted_loss"] == pytest.approx(loss, abs=1e-7)
    assert sorted(chosen) == sorted(found.tasks)
    # No path's subset is better than the one that is chosen, and it is about as good as that of all rows.
    losses = [entry["predicted_loss"] for entry in found.path]
    assert losses[-1] == min(losses)
    alone = exact.baselines["alone"]
    assert alone - losses[-1] > 0.9 * (alone - exact.path[-1]["predicted_loss"])
    assert set(found.baselines) == set(exact.baselines)
    assert found.baselines["all"] == pytest.approx(exact.baselines["all"], abs=1e-7)
    assert selector.repeat(found).tasks == found.tasks and found.settings["search_rows"] == 500


def test_a_search_stops_where_all_rows_say_so(selector):
    # However far a search in samples goes, the subset on its path that is best by all rows is taken.
    order = [f"t{task}" for task in (0, 3, 6, 9, 1, 2, 4, 5, 7, 8, 10, 11)]

    def too_far(problem):
        return searches.make_selection(problem, "forward", order, {}, [{"predicted_loss": 0.0}])

    problem = sampled_search.SelectionProblem(selector.estimator, "t0")
    found = sampled_search.sampled_selection(problem, too_far)
    column = selector.estimator.task_names.index("t0")
    prefixes = [order[: count + 1] for count in range(len(order))]
    losses = selector.estimator.predict_subsets(prefixes).loss[:, column]
    assert found.path[-1]["predicted_loss"] <= losses.min() + 1e-7
    assert set(prefixes[int(np.argmin(losses))]) <= set(found.tasks)


def test_one_more_step_is_made_from_all_rows(selector):
    names = list(selector.estimator.task_names)
    problem = sampled_search.SelectionProblem(selector.estimator, "t0")

    def losses(subsets):
        return selector.estimator.predict_subsets(subsets).loss[:, 0]

    def too_short(problem):
        return searches.make_selection(problem, "forward", ["t0"], {}, [{"predicted_loss": 0.0}])

    others = names[1:]
    best = others[int(np.argmin(losses([["t0", name] for name in others])))]
    found = sampled_search.sampled_selection(problem, too_short)
    start, step = found.path
    assert found.tasks == ["t0", best] and step["added"] == best and set(found.scores) == set(others)
    assert step["predicted_loss"] == pytest.approx(losses([["t0", best]])[0], rel=1e-3)
    assert step["predicted_loss"] < start["predicted_loss"] == pytest.approx(losses([["t0"]])[0], abs=1e-7)
    assert best not in step["close_calls"] and set(step["close_calls"]) < set(others)

    def without(*left_out):
        return [name for name in names if name not in left_out]

    def too_long(problem):
        return searches.make_selection(problem, "backward", names, {}, [{"predicted_loss": 0.0}])

    best = others[int(np.argmin(losses([without(name) for name in others])))]
    found = sampled_search.sampled_selection(problem, too_long)
    assert sorted(found.tasks) == sorted(without(best)) and found.path[-1]["removed"] == best
    # What removing a task costs.
    gained = losses([names])[0] - losses([without(best)])[0]
    assert found.scores[best] == pytest.approx(gained, rel=0.05) and gained > 0


@pytest.mark.parametrize("method", ["direct", "spectral"])
def test_partitions_from_samples_are_predicted_from_all_rows(selector, method):
    found = selector.group(method=method, search_rows=500)
    names = list(selector.estimator.task_names)
    for count, loss in found.predicted_loss.items():
        assert 1 <= int(count) <= 12 and 0 < loss < found.baselines["one per task"] + 1e-6
    labels = [int(found.group_of(name).removeprefix("group_")) for name in names]
    losses = selector.estimator.predict_subsets(list(found.groups.values())).loss
    mean = np.mean([losses[label, place] for place, label in enumerate(labels)])
    assert found.predicted_loss[str(len(found.groups))] == pytest.approx(mean, abs=1e-7)
    exact = selector.group(method=method, search_rows=None)
    assert mean < 1.02 * exact.predicted_loss[str(len(exact.groups))]
    assert selector.repeat(found).groups == found.groups


@pytest.mark.parametrize("seed", range(3))
def test_helpers_from_samples_help_by_all_rows(seed):
    train, validation = six_tasks(rows=200, dim=60, seed=seed)
    estimator = SubsetEstimator(train, validation, observed_runs=RUNS)
    groups = [
        DataSelector(estimator).group(3, overlapping_groups=overlap, search_rows=90, affinity_subsets=40)
        for overlap in (False, True)
    ]
    names = list(SIX_NAMES)
    assert groups[0].groups == groups[1].groups
    losses = [predicted_losses(estimator, own) for own in groups]
    for row, tasks in enumerate(groups[0].groups.values()):
        own = [names.index(task) for task in tasks]
        assert losses[1][row, own].sum() <= losses[0][row, own].sum() + 1e-9


def test_mixtures_from_samples_are_predicted_from_all_rows(selector):
    found = selector.group(method="mixtures", compute_budget=2.0, search_rows=500)
    weights = list(found.mixtures.values())
    losses = selector.estimator.predict_subsets(weights).loss
    served = np.mean(
        [
            losses[list(found.groups).index(found.group_of(name)), place]
            for place, name in enumerate(selector.estimator.task_names)
        ]
    )
    assert losses.min(axis=0).mean() == pytest.approx(served, abs=1e-6)
    chosen = min(found.cost_curve, key=lambda point: point["expected_loss"])
    assert chosen["predicted_loss"] == pytest.approx(served, abs=1e-6)
    assert found.cost <= 2.0 + 1e-9


@pytest.mark.parametrize("limit", [None, 10**6, 1440])
def test_as_many_rows_as_there_are_change_nothing(selector, limit):
    found, expected = (selector.select("t0", search_rows=rows) for rows in (limit, None))
    assert found.path == expected.path and found.scores == expected.scores
