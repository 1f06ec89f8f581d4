"""What true fine-tunings teach about each task's loss."""

import numpy as np
import pytest

from helpers.feature_tables import NAMES, world
from hf_ensemble.estimate import LossCalibration, ObservedRun, SubsetEstimator

BASE = np.array([0.7, 1.5, 2.5, 0.9, 1.1])


def moved(moves, factor, curvature, unit):
    return BASE * np.exp(-factor * moves * (1 + curvature) / (1 + curvature * np.abs(moves) / unit))


def calibrated_world(curvature=1.5):
    """Losses of runs after another law than the surrogate's, the first of them on all tasks."""
    moves = np.random.default_rng(0).uniform(0.02, 0.6, (40, len(BASE)))
    moves[0] = [0.5, 0.6, 0.4, 0.5, 0.45]
    factor = np.array([0.6, 1.4, 0.9, 1.1, 0.8])
    return BASE * np.exp(-moves), moved(moves, factor, curvature, np.abs(moves[0])), factor


def error(found, true):
    return np.abs(np.log(found / true)).mean()


def test_many_runs_teach_factors_and_curvature():
    predicted, true, factor = calibrated_world()
    calibration, _ = LossCalibration.fit(BASE, predicted[0], predicted, true)
    assert calibration.curvature == 1.5
    assert calibration.factor == pytest.approx(factor, rel=0.01)
    assert calibration(predicted) == pytest.approx(true, rel=0.01)


def test_two_runs_tell_most_of_it():
    predicted, true, _ = calibrated_world()
    calibration, _ = LossCalibration.fit(BASE, predicted[0], predicted[:2], true[:2])
    assert error(calibration(predicted), true) < error(predicted, true) / 2


@pytest.mark.parametrize("count", [1, 2])
def test_noise_costs_little_where_there_is_nothing_to_learn(count):
    """The error is below the noise that the runs have."""
    rng = np.random.default_rng(0)
    predicted, _, _ = calibrated_world()
    errors = []
    for _ in range(20):
        noisy = predicted * np.exp(0.05 * rng.standard_normal(predicted.shape))
        calibration, _ = LossCalibration.fit(BASE, predicted[0], predicted[:count], noisy[:count])
        errors.append(error(calibration(predicted), predicted))
    assert np.mean(errors) < 0.04


def test_one_run_says_nothing_of_the_curvature_and_little_of_tasks_that_hardly_move():
    predicted, true, factor = calibrated_world(curvature=0.0)
    predicted, true = predicted.copy(), true.copy()
    predicted[0, 4], true[0, 4] = BASE[4] * np.exp(-0.001), BASE[4] * np.exp(-0.003)
    calibration, left_out = LossCalibration.fit(BASE, predicted[0], predicted[:1], true[:1])
    assert calibration.curvature == 0 and calibration.common == pytest.approx(1.0, abs=0.15)
    # Drawn from the task's own ratio to the common one.
    own, drawn = factor[:4] - calibration.common, calibration.factor[:4] - calibration.common
    assert (drawn * own > 0).all() and (np.abs(drawn) < np.abs(own)).all()
    assert calibration.factor[4] == pytest.approx(calibration.common, rel=0.01)
    # Without its only run a task has what the others have in common.
    moves = np.log(BASE / predicted[0])
    implied = np.log(BASE / left_out[0]) / moves
    assert implied == pytest.approx(np.full(5, calibration.common), abs=0.15)
    assert (implied[:4] - calibration.common) @ own < 0


def test_the_same_run_twice_tells_no_curvature():
    predicted, true, _ = calibrated_world()
    unknown = np.full_like(true[1], np.nan)
    for runs, truth in ((predicted[[0, 0]], true[[0, 0]]), (predicted[:2], np.stack([true[0], unknown]))):
        calibration, left_out = LossCalibration.fit(BASE, predicted[0], runs, truth)
        assert calibration.curvature == 0 and np.isfinite(left_out).all()


def test_the_order_of_subsets_stays_even_where_runs_contradict():
    predicted, true, _ = calibrated_world()
    losses = np.sort(np.random.default_rng(1).uniform(0.01, 5.0, (50, len(BASE))), axis=0)
    for truth in (true, BASE**2 / true, np.full_like(true, 1.0), np.zeros_like(true)):
        for count in (1, 3):
            calibration, left_out = LossCalibration.fit(BASE, predicted[0], predicted[:count], truth[:count])
            assert (np.diff(calibration(losses), axis=0) > 0).all() and (calibration(losses) > 0).all()
            assert calibration(BASE) == pytest.approx(BASE) and np.isfinite(left_out).all()
            assert (calibration.factor >= 0.25).all() and (calibration.factor <= 4).all()


def test_one_task_does_not_speak_for_all():
    predicted = BASE[None] * np.exp(-0.3)
    true = predicted.copy()
    predicted[0, 4], true[0, 4] = BASE[4] * np.exp(-2.3), BASE[4] * 1e-9
    calibration, _ = LossCalibration.fit(BASE, predicted[0], predicted, true)
    assert calibration.factor[:4] == pytest.approx(np.ones(4), abs=0.2)


def test_a_rising_loss_takes_the_common_factor():
    predicted, true, _ = calibrated_world(curvature=0.0)
    calibration, _ = LossCalibration.fit(BASE, predicted[0], predicted, true)
    assert calibration(BASE * np.e) == pytest.approx(BASE * np.exp(calibration.common))
    assert calibration(BASE / np.e) == pytest.approx(BASE * np.exp(-calibration.factor))


def test_losses_that_are_not_known_teach_nothing():
    predicted, true, _ = calibrated_world()
    few = true[:2].copy()
    few[:, 2] = np.nan
    calibration, left_out = LossCalibration.fit(BASE, predicted[0], predicted[:2], few)
    assert calibration.factor[2] == pytest.approx(calibration.common) and np.isfinite(left_out).all()
    other = few.copy()
    other[0, 0] *= 0.5
    changed, _ = LossCalibration.fit(BASE, predicted[0], predicted[:2], other)
    assert changed.factor[2] == pytest.approx(changed.common) and changed.factor[0] > calibration.factor[0]


def test_slopes_equal_finite_differences():
    predicted, true, _ = calibrated_world()
    calibration, _ = LossCalibration.fit(BASE, predicted[0], predicted[:5], true[:5])
    assert calibration.curvature > 0
    predicted = np.vstack([predicted, 1.3 * BASE])
    step = 1e-6
    differences = (calibration(predicted + step) - calibration(predicted - step)) / (2 * step)
    assert calibration.slope(predicted) == pytest.approx(differences, rel=1e-4)


def test_tasks_that_nothing_moves_stay_where_they_are():
    calibration, left_out = LossCalibration.fit(BASE, BASE, BASE[None], BASE[None])
    assert calibration(BASE) == pytest.approx(BASE) and np.isfinite(calibration(2 * BASE)).all()
    assert left_out[0] == pytest.approx(BASE)


def runs_of(estimator, factors):
    """Fine-tunings that move each task by a factor of its own, times what an uncalibrated estimator says."""
    found = []
    for subset in (NAMES, NAMES[:2]):
        moves = np.log(estimator.base_loss() / estimator.predict_subsets([subset]).loss[0])
        losses = estimator.base_loss() * np.exp(-factors * moves)
        found.append(ObservedRun(dict.fromkeys(subset, 1.0), dict(zip(NAMES, losses.tolist()))))
    return found


def test_an_estimator_is_calibrated_by_its_runs_and_keeps_its_choices():
    surrogate = SubsetEstimator(*world())
    assert surrogate.calibration is None
    factors = np.linspace(0.5, 1.5, len(NAMES))
    runs = runs_of(surrogate, factors)
    estimator = SubsetEstimator(*world(), observed_runs=runs)
    observed = [[*run.mixture] for run in runs]
    true = np.array([[run.losses[name] for name in NAMES] for run in runs])
    scale = estimator.regularization.l2_scale
    mixtures = estimator.predict_subsets(observed).mixtures
    calibrated, plain = estimator.predict(mixtures), estimator.predict(mixtures, scale)
    errors = [np.abs(found.loss / true - 1).mean() for found in (calibrated, plain)]
    assert errors[0] < errors[1] / 2
    assert np.array_equal(calibrated.coefficients, plain.coefficients)
    assert np.array_equal(calibrated.accuracy, plain.accuracy)
    others = np.random.default_rng(0).uniform(0, 1, (30, len(NAMES)))
    losses, plain_losses = estimator.predict(others).loss, estimator.predict(others, scale).loss
    assert np.array_equal(np.argsort(losses, axis=0), np.argsort(plain_losses, axis=0))


def test_spreads_are_on_the_calibrated_scale():
    surrogate = SubsetEstimator(*world())
    estimator = SubsetEstimator(*world(), observed_runs=runs_of(surrogate, np.full(len(NAMES), 0.5)))
    mixtures = np.eye(len(NAMES))
    found = estimator.predict(mixtures)
    goal = np.eye(len(NAMES))[0]
    spread = estimator.score_spread(found.coefficients, found.coefficients[0], goal)
    estimator.calibration, calibration = None, estimator.calibration
    plain = estimator.score_spread(found.coefficients, found.coefficients[0], goal)
    raw = estimator.predict(mixtures[:1]).loss[0]
    assert spread == pytest.approx(plain * calibration.slope(raw)[0])


def test_losses_of_half_the_rows_are_calibrated_around_their_own():
    estimator = SubsetEstimator(*world(), observed_runs=[ObservedRun({"a": 1.0}, {"a": 0.3, "c": 2.0})])
    start = np.zeros((1, estimator.reduction.components.shape[1]))
    for half in estimator.halves():
        assert not np.allclose(half.base_loss(), estimator.base_loss(), rtol=1e-2)
        # What has not moved keeps its loss, whichever rows it is measured on.
        assert half.loss_at(start)[0] == pytest.approx(half.base_loss())
    assert estimator.loss_at(start)[0] == pytest.approx(estimator.base_loss())
