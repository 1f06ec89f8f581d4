"""Trainings of several lengths, predicted by one estimator."""

import numpy as np
import pytest

from helpers.feature_tables import NAMES, first_rows, world
from hf_ensemble import ObservedRun, SubsetEstimator, TrainingRecipe
from hf_ensemble.errors import EstimationError
from hf_ensemble.estimate import linearized_training

RECIPE = TrainingRecipe([0.02] * 40, 8, 300.0)
OTHERS = (0.25, 2.0)
MIXTURES = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [0.2, 0, 1, 0.7]])


@pytest.fixture(scope="module")
def estimator():
    return SubsetEstimator(*world(), recipe=RECIPE, other_lengths=OTHERS)


def repeated(length):
    return np.full(len(MIXTURES), length)


def test_they_are_those_of_an_estimator_of_each_length(estimator):
    assert estimator.lengths == (1.0, *OTHERS)
    plain = SubsetEstimator(*world(), recipe=RECIPE)
    assert np.array_equal(estimator.predict(MIXTURES).loss, plain.predict(MIXTURES).loss)
    goal = np.array([1.0, 0.0, 0.5, 0.0])
    for length in OTHERS:
        alone = SubsetEstimator(*world(), recipe=RECIPE, length=length)
        found, expected = estimator.predict(MIXTURES, lengths=repeated(length)), alone.predict(MIXTURES)
        assert np.allclose(found.loss, expected.loss, rtol=1e-5)
        assert np.allclose(found.at(1).l2_scale, alone.regularization.l2_scale, rtol=1e-4)
        assert np.allclose(estimator.training_cost(MIXTURES, repeated(length)), alone.training_cost(MIXTURES))
        own, other = (
            one.to_weights(MIXTURES[2]) for one in (estimator.sensitivity(goal, length), alone.sensitivity(goal))
        )
        assert np.allclose(own[0], other[0], rtol=1e-5) and np.allclose(own[1], other[1], rtol=1e-3, atol=1e-7)


def test_whole_numbers_are_lengths(estimator):
    whole = SubsetEstimator(*world(), recipe=RECIPE, length=1, other_lengths=[2, 0.25])
    assert whole.lengths == estimator.lengths and all(type(length) is float for length in whole.lengths)
    lengths = np.array([2, 1, 1])
    assert np.array_equal(
        whole.predict(MIXTURES, lengths=lengths).loss, estimator.predict(MIXTURES, lengths=lengths).loss
    )


def test_lengths_are_compared_on_a_sample_of_many_rows(estimator, monkeypatch):
    replayed, sizes = linearized_training.replayed_coefficients, []

    def counted(features, *arguments):
        sizes.append(len(features))
        return replayed(features, *arguments)

    monkeypatch.setattr(linearized_training, "_REPLAYED_ROWS", 80)
    monkeypatch.setattr(linearized_training, "replayed_coefficients", counted)
    sampled = SubsetEstimator(*world(), recipe=RECIPE, other_lengths=OTHERS)
    # The training itself is replayed on all rows.
    assert sizes == [160, 80, 80, 80]
    assert np.array_equal(sampled.predict(MIXTURES).loss, estimator.predict(MIXTURES).loss)
    for length in OTHERS:
        scales = [one.predict(MIXTURES, lengths=repeated(length)).l2_scale[0] for one in (sampled, estimator)]
        assert scales[0] == pytest.approx(scales[1], rel=0.15)


def test_mixtures_of_different_lengths_are_predicted_at_once(estimator):
    lengths = np.array([2.0, 1.0, 0.25])
    together = estimator.predict(MIXTURES, lengths=lengths).loss
    for row, length in enumerate(lengths):
        one = estimator.predict(MIXTURES[row : row + 1], lengths=[length]).loss[0]
        assert together[row] == pytest.approx(one, rel=1e-6)
    # Longer trainings go further.
    moved = np.abs(estimator.predict(np.repeat(MIXTURES[:1], 3, 0), lengths=[0.25, 1.0, 2.0]).coefficients).sum(axis=1)
    assert (np.diff(moved) > 0).all()


def test_what_was_measured_at_one_length_calibrates_the_others():
    train, validation = world()
    run = ObservedRun(dict.fromkeys(NAMES, 1.0), dict.fromkeys(NAMES, 0.6))
    calibrated = SubsetEstimator(train, validation, observed_runs=[run], recipe=RECIPE, other_lengths=OTHERS)
    replayed = SubsetEstimator(train, validation, recipe=RECIPE, other_lengths=OTHERS)
    scales = [one.predict(MIXTURES, lengths=[1.0, 0.25, 2.0]).l2_scale for one in (calibrated, replayed)]
    assert scales[0] / scales[0][0] == pytest.approx(scales[1] / scales[1][0], rel=1e-4)
    assert scales[0][0] == calibrated.regularization.l2_scale != pytest.approx(scales[1][0], rel=0.05)
    found = calibrated.predict(MIXTURES, lengths=repeated(2.0))
    assert (found.loss_low < found.loss).all() and (found.loss < found.loss_high).all()


def test_parts_of_an_estimator_know_them_too(estimator):
    lengths = np.array([2.0, 1.0, 0.25])
    expected = estimator.predict(MIXTURES, lengths=lengths)
    for half in estimator.halves():
        assert np.allclose(half.predict(MIXTURES, lengths=lengths).coefficients, expected.coefficients)
    fewer = estimator.truncated(10).predict(MIXTURES, lengths=lengths).l2_scale
    assert np.array_equal(fewer, expected.l2_scale)
    assert np.array_equal(estimator.sampled(40).predict(MIXTURES, lengths=lengths).l2_scale, expected.l2_scale)


def test_the_noise_of_a_sample_is_that_of_the_training_s_own_length():
    train, validation = world(rows=60)
    rows = first_rows(train, [20] * 4), validation
    one, other = (SubsetEstimator(*rows, recipe=RECIPE, **own) for own in ({"other_lengths": [2.0]}, {"length": 2.0}))
    found, expected = one.predict(MIXTURES, lengths=repeated(2.0)), other.predict(MIXTURES)
    assert np.allclose(one.sampling_noise(found), other.sampling_noise(expected), rtol=1e-3)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([0.0], "other_lengths has to be a finite number above 0"),
        (["long"], "other_lengths has to be a finite number above 0"),
        (0.5, "Expected other_lengths as a list"),
        ("12", "Expected other_lengths as a list"),
    ],
)
def test_lengths_that_are_none_are_refused(others, message):
    with pytest.raises(EstimationError, match=message):
        SubsetEstimator(*world(), recipe=RECIPE, other_lengths=others)


def test_lengths_that_nothing_was_replayed_for_are_refused(estimator):
    with pytest.raises(EstimationError, match=r"Expected a recipe, which is replayed for other_lengths=\[0.5\]"):
        SubsetEstimator(*world(), other_lengths=[0.5])
    with pytest.raises(EstimationError, match=r"Expected lengths among \[0.25, 1.0, 2.0\], found 0.5"):
        estimator.predict(MIXTURES, lengths=repeated(0.5))
    with pytest.raises(EstimationError, match="Expected lengths among"):
        estimator.sensitivity(np.ones(4), 3.0)
