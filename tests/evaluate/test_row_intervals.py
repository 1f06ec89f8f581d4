"""Intervals of scores over rows."""

import numpy as np
import pytest

from hf_ensemble.errors import ConfigurationError, ScoringError
from hf_ensemble.evaluate import RowScores, system_intervals


def rows(loss, correct=None, **metrics):
    loss = np.asarray(loss, dtype=float)
    return RowScores(loss, np.zeros(len(loss)) if correct is None else np.asarray(correct, float), metrics=metrics)


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    held = paired = 0
    for seed in range(300):
        first = generator.exponential(1.0, 60)
        second = first + generator.normal(0.1, 0.2, 60)
        found = system_intervals({"one": {"t": rows(first)}, "two": {"t": rows(second)}}, "one", 0.9, 400, seed)
        low, high = found["one"].tasks["t"]["loss"]
        held += low <= 1.0 <= high
        low, high = found["two"].differences["t"]["loss"].interval
        paired += low <= 0.1 <= high
    assert 0.84 <= held / 300 <= 0.95 and 0.84 <= paired / 300 <= 0.95


def test_differences_are_paired_and_means_are_over_tasks():
    generator = np.random.default_rng(1)
    first = {task: rows(generator.exponential(2.0, size)) for task, size in (("a", 40), ("b", 80))}
    second = {task: rows(own.loss - 0.05) for task, own in first.items()}
    found = system_intervals({"baseline": first, "ensemble": second}, "baseline")
    # A constant difference has no spread, however far the losses themselves scatter.
    ensemble = found["ensemble"]
    for own in (*(one["loss"] for one in ensemble.differences.values()), ensemble.mean_difference["loss"]):
        assert (own.value, *own.interval) == pytest.approx((-0.05,) * 3) and own.is_clear
    assert found["baseline"].differences == {} and found["baseline"].mean_difference == {}
    low, high = found["baseline"].mean["loss"]
    assert low < np.mean([own.loss.mean() for own in first.values()]) < high
    widths = [np.subtract(*found["baseline"].tasks[task]["loss"][::-1]) for task in first]
    assert high - low < max(widths)


def test_shares_keep_an_interval_where_all_rows_are_right():
    found = system_intervals({"s": {"t": rows(np.ones(50), np.ones(50), f1=np.full(50, 0.5))}})["s"].tasks["t"]
    # Wilson's: n / (n + z^2).
    assert found["accuracy"] == pytest.approx((50 / (50 + 1.959964**2), 1.0), abs=1e-6)
    assert found["f1"] == (0.5, 0.5)


def test_many_rows_are_resampled_in_pieces(monkeypatch):
    values = rows(np.random.default_rng(2).normal(size=500))
    whole = system_intervals({"s": {"t": values}})["s"].tasks["t"]["loss"]
    monkeypatch.setattr("hf_ensemble.evaluate.row_intervals._HELD", 1000)
    pieces = system_intervals({"s": {"t": values}})["s"].tasks["t"]["loss"]
    assert pieces == pytest.approx(whole, abs=0.02) and pieces[0] < values.loss.mean() < pieces[1]


def test_figures_that_only_some_systems_or_tasks_have():
    found = system_intervals(
        {
            "base": {"a": rows([1.0, 2.0]), "b": rows([1.0, 3.0])},
            "ensemble": {"a": rows([0.5, 1.0], exact_match=np.array([0.0, 1.0]))},
        },
        "base",
    )
    assert "exact_match" in found["ensemble"].tasks["a"] and "exact_match" not in found["ensemble"].mean_difference
    assert set(found["ensemble"].differences["a"]) == {"loss", "accuracy"}
    assert system_intervals({}) == {}


def test_a_mean_of_shares_has_an_interval_as_each_of_them_does():
    right = {task: rows(np.zeros(50), np.ones(50)) for task in "abcd"}
    alone = system_intervals({"s": {"a": right["a"]}})["s"]
    assert alone.mean["accuracy"] == pytest.approx(alone.tasks["a"]["accuracy"], abs=1e-12)
    low, high = system_intervals({"s": right})["s"].mean["accuracy"]
    # Four times the rows, in strata: the distance to the limit halves.
    assert high == 1.0 and 1 - low == pytest.approx((1 - alone.mean["accuracy"][0]) / 2)
    generator = np.random.default_rng(3)
    held = 0
    for seed in range(300):
        own = {task: rows(np.zeros(30), generator.random(30) < share) for task, share in (("a", 0.5), ("b", 0.9))}
        low, high = system_intervals({"s": own}, level=0.9, num_samples=1, seed=seed)["s"].mean["accuracy"]
        held += low <= 0.7 <= high
    assert 0.86 <= held / 300 <= 0.95


def test_what_is_no_comparison_is_refused():
    one = {"t": rows([1.0, 2.0])}
    with pytest.raises(ConfigurationError, match=r"reference has to be one of \('one',\), found 'two'"):
        system_intervals({"one": one}, "two")
    with pytest.raises(ConfigurationError, match="level has to be"):
        system_intervals({"one": one}, level=95)
    with pytest.raises(ScoringError, match=r"same rows of 't' for every system, found numbers {'one': 2, 'two': 3}"):
        system_intervals({"one": one, "two": {"t": rows([1.0, 2.0, 3.0])}})
