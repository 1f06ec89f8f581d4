"""Estimates from samples of rows are of trainings on all rows, and say how far they are from them."""

from dataclasses import replace

import numpy as np
import pytest

from helpers.feature_tables import NAMES, first_rows, sample_of, world
from hf_ensemble import FeatureTable, ObservedRun, SubsetEstimator, TrainingRecipe
from hf_ensemble.estimate import Regularization

COPIES = np.array([3, 1, 5, 2])
RECIPE = TrainingRecipe([0.02] * 40, 8, 300.0, 0.5)
RUN = [ObservedRun(dict.fromkeys(NAMES, 1.0), dict.fromkeys(NAMES, 0.6))] * 2


def repeated(table):
    """Every row as often as its task says."""
    return replace(sample_of(table, np.repeat(np.arange(len(table)), COPIES[table.task])), task_sizes=None)


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


def errors_and_noises(monkeypatch, sizes, held_out):
    """Of forty samples, `(40, 3, 2)` each: how far losses are from those of all rows, and how far they are said to be.

    The penalty is the same for all, and there are thirty components, which lose nothing.
    """
    every, validation = population(1000), population(300, seed=1)
    penalty = Regularization(1.0, "validation_loss", 0.0)
    monkeypatch.setattr("hf_ensemble.estimate.estimator.choose_regularization", lambda *_: penalty)
    mixtures = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    truth = SubsetEstimator(every, validation).predict(mixtures).loss
    rng, errors, noises = np.random.default_rng(2), [], []
    for _ in range(40):
        kept = [np.sort(rng.choice(1000, size, replace=False)) + 1000 * task for task, size in enumerate(sizes)]
        scored = [np.sort(rng.choice(300, held_out, replace=False)) + 300 * task for task in (0, 1)]
        rows = sample_of(every, np.concatenate(kept)), sample_of(validation, np.concatenate(scored))
        sampled = SubsetEstimator(*rows)
        prediction = sampled.predict(mixtures)
        errors.append(prediction.loss - truth)
        noises.append(sampled.sampling_noise(prediction))
    return np.array(errors), np.array(noises)


def test_noise_of_samples_is_what_it_is_said_to_be(monkeypatch):
    """Losses from many samples scatter around those of all rows as far as each of them says."""
    errors, noises = errors_and_noises(monkeypatch, (500, 250), 150)
    ratio = np.sqrt(np.square(errors).mean(axis=0) / np.square(noises).mean(axis=0))
    assert (ratio > 0.75).all() and (ratio < 1.3).all(), ratio
    assert (np.abs(errors) < 1.645 * noises).mean() == pytest.approx(0.9, abs=0.05)


def test_noise_counts_that_an_optimum_follows_its_own_rows(monkeypatch):
    """Few rows for thirty components: without their leverage, losses scatter 1.7 times as far as is said."""
    errors, noises = errors_and_noises(monkeypatch, (60, 50), 300)
    assert np.sqrt(np.square(errors).mean() / np.square(noises).mean()) == pytest.approx(1.0, abs=0.2)


def test_intervals_are_wider_where_fewer_rows_were_seen():
    train, validation = world(rows=60)

    def width(count):
        estimator = SubsetEstimator(first_rows(train, [count] * 4), validation, observed_runs=RUN)
        found = estimator.predict_subsets([NAMES])
        assert found.at(0).loss_low.tolist() == found.loss_low.tolist()
        # What is left without the noise is the same in all of them.
        bare = estimator.interval.around(found.loss, found.displacement)
        return np.log(found.loss_high / found.loss_low) ** 2 - np.log(bare[1] / bare[0]) ** 2

    none, half, few = (width(count) for count in (60, 30, 15))
    assert np.abs(none).max() < 1e-12 and (half > 0).all() and (half < few).all()


@pytest.mark.filterwarnings("error")
def test_noise_of_validation_rows_alone_is_that_of_the_calibrated_loss():
    train, validation = world(rows=60)
    sampled = first_rows(validation, [20, 30, 40, 60])
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
    estimator = SubsetEstimator(first_rows(train, [60, 30, 60, 60]), validation, observed_runs=RUN)
    found = estimator.predict_subsets([["a", "c"], ["a", "b"]])
    noise = estimator.sampling_noise(found)
    assert (noise[0] == 0).all() and (noise[1] > 0).all()
    bare = estimator.interval.around(found.loss, found.displacement)
    assert found.loss_low[0] == pytest.approx(bare[0][0]) and (found.loss_low[1] < bare[0][1]).all()


@pytest.mark.filterwarnings("error")
def test_a_single_row_of_many_has_no_interval():
    train, validation = world(rows=60)
    estimator = SubsetEstimator(first_rows(train, [60, 1, 60, 60]), validation, observed_runs=RUN)
    low = estimator.predict_subsets([["a", "c"], ["a", "b"]]).loss_low
    assert np.isfinite(low[0]).all() and np.isnan(low[1]).all()
    estimator = SubsetEstimator(train, first_rows(validation, [60, 1, 60, 60]), observed_runs=RUN)
    assert np.isnan(estimator.predict_subsets([NAMES]).loss_low[0]).tolist() == [False, True, False, False]
