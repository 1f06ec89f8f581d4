"""Searches look at samples of rows that stand for all of them."""

import numpy as np
import pytest

from helpers.feature_tables import world
from hf_ensemble import FeatureTable, ObservedRun, SubsetEstimator
from hf_ensemble.estimate import estimator as estimator_module
from hf_ensemble.estimate.search_rows import sampled_rows


@pytest.mark.parametrize(("most", "expected"), [(12, [4, 2, 5]), (11, [4, 2, 5]), (9, [3, 2, 3]), (1, [1, 1, 1])])
def test_tasks_have_equal_shares_of_a_sample(most, expected):
    task = np.repeat([0, 1, 2], [4, 2, 5])
    rows = sampled_rows(task, np.arange(11.0), most)
    assert (np.diff(rows) > 0).all()
    assert np.bincount(task[rows]).tolist() == expected


def test_each_row_is_as_likely_and_margins_are_spread():
    rng = np.random.default_rng(0)
    task, margin = np.repeat([0, 1], 50), rng.normal(size=100)
    drawn = np.zeros(100)
    for seed in range(400):
        rows = sampled_rows(task, margin, 20, seed)
        drawn[rows] += 1
        # One of every fifth of the ranks: as independent draws would be in one of 27,000 samples of a task.
        ranks = np.argsort(np.argsort(margin[:50]))[rows[rows < 50]]
        assert np.bincount(np.sort(ranks) // 5, minlength=10).tolist() == [1] * 10
    assert drawn.min() > 40 and drawn.max() < 120
    assert np.array_equal(sampled_rows(task, margin, 20, 3), sampled_rows(task, margin, 20, 3))


def many_rows(rows=400, tasks=6, dim=10, seed=0, row_tokens=False):
    rng = np.random.default_rng(seed)
    means = 0.6 * rng.normal(size=(tasks, dim))
    names = tuple(f"t{task}" for task in range(tasks))

    def table():
        # Tasks of different sizes, not sorted.
        task = rng.permutation(np.repeat(np.arange(tasks), rows + 20 * np.arange(tasks)))
        features = (rng.normal(size=(len(task), dim)) + means[task]).astype(np.float32)
        tokens = rng.integers(1, 4, len(task)) if row_tokens else None
        return FeatureTable(features, rng.normal(size=len(task)), task, names, np.arange(len(task)).astype(str), tokens)

    train, validation = table(), table()
    base = np.bincount(validation.task, np.logaddexp(0, -validation.margin)) / validation.sizes
    run = ObservedRun(dict.fromkeys(names, 1.0), dict(zip(names, (0.85 * base).tolist())))
    return train, validation, run


@pytest.mark.parametrize("row_tokens", [False, True])
def test_predictions_from_a_sample_are_of_trainings_on_all_rows(row_tokens):
    train, validation, run = many_rows(row_tokens=row_tokens)
    estimator = SubsetEstimator(train, validation, observed_runs=[run], sampling_weights={"t1": 2.0})
    sample = estimator.sampled(900)
    mixtures = np.vstack([np.eye(6), np.ones((1, 6))])
    assert sample.penalty(mixtures[2]) == estimator.penalty(mixtures[2])
    assert np.array_equal(sample.task_gradients(), estimator.task_gradients())
    assert np.array_equal(sample.training_cost(mixtures), estimator.training_cost(mixtures))
    assert len(sample._validation) == 900
    found, expected = sample.predict(mixtures), estimator.predict(mixtures)
    # A third of the rows: far closer than the gains that are chosen by.
    gain = estimator.base_loss() - expected.loss
    assert np.abs(found.loss - expected.loss).mean() < 0.25 * np.abs(gain).mean()
    totals = estimator._train.totals
    assert np.allclose(sample._train.totals, totals) and sample.counts.tolist() == estimator.counts.tolist()


def test_a_sample_of_all_rows_is_the_estimator_itself():
    train, validation, run = many_rows()
    estimator = SubsetEstimator(train, validation, observed_runs=[run])
    assert estimator.num_rows == len(train)
    assert estimator.sampled(len(train)) is estimator
    assert estimator.sampled(len(train) - 1) is not estimator


@pytest.mark.parametrize("evidence", ["observed_runs", "validation_loss"])
def test_c_is_found_from_some_rows_first_where_there_are_many(monkeypatch, evidence):
    train, validation, run = many_rows()
    runs = [run] if evidence == "observed_runs" else []
    exact = SubsetEstimator(train, validation, observed_runs=runs).regularization
    monkeypatch.setattr(estimator_module, "_MOST_FITTED", 1_000)
    monkeypatch.setattr(estimator_module, "_ROUGHLY_FITTED", 300)
    predicted, predict = [], SubsetEstimator.predict
    monkeypatch.setattr(
        SubsetEstimator, "predict", lambda self, *args, **kwargs: predicted.append(1) or predict(self, *args, **kwargs)
    )
    found = SubsetEstimator(train, validation, observed_runs=runs).regularization
    assert len(predicted) == len(runs)
    assert found.evidence == evidence
    assert found.criterion == pytest.approx(exact.criterion, rel=1e-2, abs=1e-5)
    assert found.l2_scale == pytest.approx(exact.l2_scale, rel=0.03)


def test_few_rows_are_fitted_as_they_are():
    train, validation = world()
    estimator = SubsetEstimator(train, validation)
    assert estimator.sampled(10**6) is estimator
