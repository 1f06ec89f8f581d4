"""Estimates from samples of rows are of trainings on all rows, and say how far they are from them."""

from dataclasses import replace

import numpy as np
import pytest

from helpers.feature_tables import NAMES, world
from hf_ensemble import FeatureTable, ObservedRun, SubsetEstimator, TrainingRecipe
from hf_ensemble.estimate import Regularization

COPIES = np.array([3, 1, 5, 2])
RECIPE = TrainingRecipe([0.02] * 40, 8, 300.0, 0.5)
RUN = [ObservedRun(dict.fromkeys(NAMES, 1.0), dict.fromkeys(NAMES, 0.6))] * 2


def repeated(table):
    """Every row as often as its task says."""
    rows = np.repeat(np.arange(len(table)), COPIES[table.task])
    arrays = {name: getattr(table, name)[rows] for name in ("features", "margin", "task", "example_id", "num_tokens")}
    return replace(table, **arrays)


@pytest.mark.parametrize("weighting", ["tokens", "tasks"])
def test_a_row_that_stands_for_several_is_as_good_as_these(weighting):
    train, validation = world(tokens=True)
    options = {"recipe": RECIPE, "task_loss_weighting": weighting, "sampling_weights": {"b": 2.0}}
    # As many components as there are dimensions: those of repeated rows are others.
    one = SubsetEstimator(replace(train, task_sizes=40 * COPIES), validation, **options)
    all_rows = SubsetEstimator(repeated(train), validation, **options)
    assert one.counts.tolist() == all_rows.counts.tolist()
    assert np.abs(one.token_counts - all_rows.token_counts).max() <= 1
    mixtures = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [0.2, 0, 1, 0.7]])
    assert one.penalty(mixtures[1]) == pytest.approx(all_rows.penalty(mixtures[1]), rel=1e-3)
    assert np.allclose(one.predict(mixtures).loss, all_rows.predict(mixtures).loss, atol=1e-5)
    assert np.allclose(one.training_cost(mixtures), all_rows.training_cost(mixtures))
    goal = np.array([1.0, 0.0, 0.5, 0.0])
    for own, other in zip(one.weighted_loss(mixtures[2], goal), all_rows.weighted_loss(mixtures[2], goal)):
        assert np.allclose(own, other, rtol=1e-3, atol=1e-5)
    # A row's influence is that of the single row.
    first = np.concatenate([[0], np.cumsum(COPIES[train.task])[:-1]])
    found, expected = (own.example_influence(mixtures[0], goal) for own in (one, all_rows))
    assert np.allclose(found, expected[first], rtol=1e-3, atol=1e-7)


def test_sizes_that_are_those_of_the_table_change_nothing():
    train, validation = world()
    plain, sized = (
        SubsetEstimator(train, validation),
        SubsetEstimator(replace(train, task_sizes=train.sizes), validation),
    )
    assert np.array_equal(plain.predict(np.ones((1, 4))).loss, sized.predict(np.ones((1, 4))).loss)


def population(rows, dim=30, seed=0):
    """Two tasks that want different moves."""
    rng = np.random.default_rng(seed)
    direction = np.random.default_rng(9).normal(size=(2, dim)) / np.sqrt(dim)
    task = np.repeat([0, 1], rows)
    features = rng.normal(size=(2 * rows, dim)) / np.sqrt(dim) + 0.5 * direction[task]
    return FeatureTable(
        features.astype(np.float32), rng.normal(size=2 * rows), task, ("a", "b"), np.arange(2 * rows).astype(str)
    )


def taken(table, kept):
    arrays = {name: getattr(table, name)[kept] for name in ("features", "margin", "task", "example_id")}
    return replace(table, **arrays, task_sizes=table.num_captured)


def test_noise_of_samples_is_what_it_is_said_to_be(monkeypatch):
    """Losses from many samples scatter around those of all rows as far as each of them says."""
    every, validation = population(1000), population(300, seed=1)
    # The same penalty for all, and thirty components, which lose nothing.
    penalty = Regularization(1.0, "validation_loss", 0.0)
    monkeypatch.setattr("hf_ensemble.estimate.estimator.choose_regularization", lambda *_: penalty)
    full = SubsetEstimator(every, validation)
    mixtures = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    truth = full.predict(mixtures).loss
    rng, errors, noises = np.random.default_rng(2), [], []
    for _ in range(40):
        kept = [np.sort(rng.choice(1000, size, replace=False)) + 1000 * task for task, size in ((0, 500), (1, 250))]
        held_out = np.sort(np.concatenate([rng.choice(300, 150, replace=False) + 300 * task for task in (0, 1)]))
        sampled = SubsetEstimator(taken(every, np.concatenate(kept)), taken(validation, held_out))
        prediction = sampled.predict(mixtures)
        errors.append(prediction.loss - truth)
        noises.append(sampled.sampling_noise(prediction))
    ratio = np.sqrt(np.square(errors).mean(axis=0) / np.square(noises).mean(axis=0))
    assert (ratio > 0.75).all() and (ratio < 1.3).all(), ratio
    assert (np.abs(errors) < 1.645 * np.array(noises)).mean() == pytest.approx(0.9, abs=0.05)


def test_intervals_are_wider_where_fewer_rows_were_seen():
    train, validation = world(rows=60)

    def width(count):
        kept = np.concatenate([np.arange(count) + 60 * task for task in range(4)])
        arrays = {name: getattr(train, name)[kept] for name in ("features", "margin", "task", "example_id")}
        table = replace(train, **arrays, task_sizes=np.full(4, 60) if count < 60 else None)
        estimator = SubsetEstimator(table, validation, observed_runs=RUN)
        found = estimator.predict_subsets([NAMES])
        assert found.at(0).loss_low.tolist() == found.loss_low.tolist()
        # What is left without the noise is the same in all of them.
        bare = estimator.interval.around(found.loss, found.displacement)
        return np.log(found.loss_high / found.loss_low) ** 2 - np.log(bare[1] / bare[0]) ** 2

    none, half, few = (width(count) for count in (60, 30, 15))
    assert np.abs(none).max() < 1e-12 and (half > 0).all() and (half < few).all()


def some_of(table, counts, size):
    """The first rows of each task, of `size` where they are fewer."""
    kept = np.concatenate([np.flatnonzero(table.task == task)[:count] for task, count in enumerate(counts)])
    arrays = {name: getattr(table, name)[kept] for name in ("features", "margin", "task", "example_id")}
    return replace(table, **arrays, task_sizes=np.full(len(counts), size))


@pytest.mark.filterwarnings("error")
def test_noise_of_validation_rows_alone_is_that_of_the_calibrated_loss():
    train, validation = world(rows=60)
    sampled = some_of(validation, [20, 30, 40, 60], 60)
    estimator = SubsetEstimator(train, sampled, observed_runs=RUN)
    found = estimator.predict_subsets([NAMES])
    raw = estimator.predict(np.ones((1, 4)), l2_scale=estimator.regularization.l2_scale).loss[0]
    margins = np.array(list(estimator.linear_margins(found.coefficients[0]).values()))
    variance = np.array([np.logaddexp(0, -margins[sampled.task == task]).var(ddof=1) for task in range(4)])
    counts, step = sampled.num_captured, 1e-6
    slope = (estimator.calibration(raw + step) - estimator.calibration(raw - step)) / (2 * step)
    assert np.abs(slope - 1).max() > 0.05
    expected = slope * np.sqrt((1 - counts / 60) * variance / counts)
    assert estimator.sampling_noise(found)[0] == pytest.approx(expected, rel=1e-4) and expected[3] == 0
    assert np.isfinite(found.loss_low).all() and (found.loss_low < found.loss).all()


@pytest.mark.filterwarnings("error")
def test_a_mixture_of_tasks_that_are_captured_whole_has_no_noise():
    train, validation = world(rows=60)
    estimator = SubsetEstimator(some_of(train, [60, 30, 60, 60], 60), validation, observed_runs=RUN)
    found = estimator.predict_subsets([["a", "c"], ["a", "b"]])
    noise = estimator.sampling_noise(found)
    assert (noise[0] == 0).all() and (noise[1] > 0).all()
    bare = estimator.interval.around(found.loss, found.displacement)
    assert found.loss_low[0] == pytest.approx(bare[0][0]) and (found.loss_low[1] < bare[0][1]).all()


@pytest.mark.filterwarnings("error")
def test_a_single_row_of_many_has_no_interval():
    train, validation = world(rows=60)
    estimator = SubsetEstimator(some_of(train, [60, 1, 60, 60], 60), validation, observed_runs=RUN)
    low = estimator.predict_subsets([["a", "c"], ["a", "b"]]).loss_low
    assert np.isfinite(low[0]).all() and np.isnan(low[1]).all()
    estimator = SubsetEstimator(train, some_of(validation, [60, 1, 60, 60], 60), observed_runs=RUN)
    assert np.isnan(estimator.predict_subsets([NAMES]).loss_low[0]).tolist() == [False, True, False, False]
