"""Where validation rows are a sample, runs whose losses are known of all rows say how far its level is off."""

from dataclasses import replace

import numpy as np
import pytest

from helpers.feature_tables import NAMES, SIX_NAMES, six_tasks, world
from hf_ensemble import DataSelector, ObservedRun, SubsetEstimator
from hf_ensemble.errors import EstimationError
from hf_ensemble.estimate.outcomes import predicted_outcomes

ALL = dict.fromkeys(NAMES, 1.0)
CAPTURED = dict(zip(NAMES, (0.55, 0.6, 0.62, 0.5)))


def first_rows(table, count):
    """The first rows of each task, a sample of the table's."""
    return sample_of(table, [np.flatnonzero(table.task == task)[:count] for task in range(len(table.task_names))])


def sample_of(table, rows):
    """A table of some rows of each task, which knows how many there are."""
    kept = np.sort(np.concatenate(rows))
    arrays = {name: getattr(table, name)[kept] for name in ("features", "margin", "task", "example_id")}
    return replace(table, **arrays, num_tokens=None, task_sizes=table.num_captured)


def test_fits_are_to_the_captured_rows_and_predictions_at_the_level_of_all():
    train, validation = world(rows=60)
    sampled = first_rows(validation, 20)
    levels = np.array([1.3, 0.8, 1.0, 1.1])
    losses = {name: CAPTURED[name] * level for name, level in zip(NAMES, levels)}
    runs = [ObservedRun(ALL, losses, CAPTURED), ObservedRun({"a": 1.0}, {"b": 0.66}, {"b": 0.6 / 0.8})]
    plain = [ObservedRun(ALL, CAPTURED), ObservedRun({"a": 1.0}, {"b": 0.6 / 0.8})]
    own, same = (SubsetEstimator(train, sampled, observed_runs=known) for known in (runs, plain))
    assert own.regularization == same.regularization and own.interval == same.interval
    assert own.calibration.factor.tolist() == same.calibration.factor.tolist()
    # Of a task with several runs, the ratio of the sums of their losses.
    levels[1] = (0.48 + 0.66) / (0.6 + 0.75)
    mixtures = np.array([[1, 1, 1, 1], [1, 0, 0, 0.5]])
    found, expected = own.predict(mixtures), same.predict(mixtures)
    assert found.loss == pytest.approx(expected.loss * levels, rel=1e-12)
    assert own.loss_at(found.coefficients) == pytest.approx(found.loss, rel=1e-6)
    assert found.accuracy.tolist() == expected.accuracy.tolist()
    goal = np.array([1.0, 0.0, 0.5, 0.0])
    for one, other in zip(own.weighted_loss(mixtures[1], goal), same.weighted_loss(mixtures[1], goal * levels)):
        assert one == pytest.approx(other, rel=1e-6)
    assert own.calibration.by_task(NAMES)["level"] == pytest.approx(dict(zip(NAMES, levels)))
    assert "level" not in same.calibration.by_task(NAMES)
    for half in own.halves():
        assert half.calibration.level.tolist() == own.calibration.level.tolist()


def test_a_task_whose_level_no_run_knows_keeps_its_own():
    train, validation = world(rows=60)
    runs = [ObservedRun(ALL, CAPTURED, {"a": 0.5}), ObservedRun(ALL, {"b": float("nan")}, {"b": 0.6})]
    level = SubsetEstimator(train, first_rows(validation, 20), observed_runs=runs).calibration.level
    assert level == pytest.approx([1.1, 1.0, 1.0, 1.0])


@pytest.mark.filterwarnings("error")
def test_noise_is_that_of_residuals_from_the_run():
    train, validation = world(rows=60)
    sampled = first_rows(validation, 20)
    runs = [ObservedRun({"d": 1.0}, {"a": 0.7}), ObservedRun(ALL, CAPTURED, {"a": 0.5, "c": 0.6})]
    estimator = SubsetEstimator(train, sampled, observed_runs=runs)
    together, alone = estimator.predict_subsets([NAMES, ["b"]]).coefficients
    noise = estimator.sampling_noise(estimator.predict_subsets([NAMES, ["b"]]))
    # Nothing is left of the noise at the run itself.
    assert noise[0, [0, 2]] == pytest.approx([0, 0], abs=1e-7) and (noise[0, [1, 3]] > 0.01).all()
    reduced = estimator.reduction.apply(sampled.features)
    at_run, at_mixture = (np.logaddexp(0, -(sampled.margin + reduced @ w)) for w in (together, alone))
    raw = estimator.predict(np.array([[0, 1, 0, 0]]), l2_scale=estimator.regularization.l2_scale).loss[0]
    slopes = estimator.calibration.slope(raw)
    for task in range(4):
        rows = sampled.task == task
        ratio = at_mixture[rows].mean() / at_run[rows].mean() if task in (0, 2) else 0.0
        variance = (at_mixture[rows] - ratio * at_run[rows]).var(ddof=1)
        assert noise[1, task] == pytest.approx(slopes[task] * np.sqrt((1 - 20 / 60) * variance / 20), rel=1e-4)


@pytest.mark.parametrize(
    ("losses", "captured"),
    [({"d": 0.5}, CAPTURED), (CAPTURED, {"d": 0.5, "a": float("nan")})],
    ids=["whole", "captured"],
)
def test_where_either_loss_is_unknown_there_is_no_level_and_no_less_noise(losses, captured):
    train, validation = world(rows=60)
    sampled = first_rows(validation, 20)
    own, same = (
        SubsetEstimator(train, sampled, observed_runs=[run])
        for run in (ObservedRun(ALL, losses, captured), ObservedRun(ALL, CAPTURED))
    )
    assert own.calibration.level.tolist() == [1.0, 1.0, 1.0, 1.0]
    noise, expected = (one.sampling_noise(one.predict_subsets([NAMES]))[0] for one in (own, same))
    assert noise[:3] == pytest.approx(expected[:3], rel=1e-9) and noise[3] < 1e-6 < expected[3]


def test_predictions_from_samples_are_nearer_and_as_far_off_as_they_say():
    """With the level of a run, and without it, over many samples of validation rows."""
    train, validation = six_tasks(rows=120)
    everything, mixtures = np.ones((1, 6)), np.array([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 1.0], [1, 0, 1, 0, 1, 0]])
    full = SubsetEstimator(train, validation, num_components=40)
    w, truth = (full.predict(own, l2_scale=5.0) for own in (everything, mixtures))
    # What is the truth of the calibrating run and of the mixtures.
    losses, rng = dict(zip(SIX_NAMES, w.loss[0].tolist())), np.random.default_rng(0)
    errors = {"level": [], "no level": []}
    noises = []
    for _ in range(10):
        kept = [rng.choice(np.flatnonzero(validation.task == task), 40, replace=False) for task in range(6)]
        sampled = sample_of(validation, kept)
        own = predicted_outcomes(
            full.reduction.apply(sampled.features), sampled.margin, sampled.task, 6, w.coefficients
        )[0][0]
        for name, captured in (("level", dict(zip(SIX_NAMES, own.tolist()))), ("no level", {})):
            run = ObservedRun(dict.fromkeys(SIX_NAMES, 1.0), losses, captured)
            estimator = SubsetEstimator(train, sampled, num_components=40, observed_runs=[run])
            found = estimator.predict(mixtures)
            errors[name].append(found.loss - truth.loss)
            if captured:
                noises.append(estimator.sampling_noise(found))
    error, without = (np.sqrt(np.square(errors[name]).mean()) for name in ("level", "no level"))
    assert error < 0.7 * without, (error, without)
    ratio = np.sqrt(np.square(errors["level"]).mean(axis=0) / np.square(noises).mean(axis=0))
    assert 0.75 < np.sqrt(np.square(ratio).mean()) < 1.3, ratio


def test_choices_know_the_losses_of_captured_rows(tmp_path):
    run = ObservedRun({"a": 1.0}, {"a": 0.5, "b": 0.7}, {"a": 0.45})
    assert ObservedRun(**run.as_dict()) == run
    assert run.as_dict()["captured_losses"] == {"a": 0.45}
    assert set(ObservedRun({"a": 1.0}, {"a": 0.5}).as_dict()) == {"mixture", "losses"}
    train, validation = world(rows=60)
    estimator = SubsetEstimator(train, first_rows(validation, 20), observed_runs=[run])
    grouping = DataSelector(estimator).group(2)
    assert grouping.provenance["observed_runs"] == [run.as_dict()]
    mixtures = DataSelector(estimator).group(2, "mixtures", compute_budget=2.0, trained={"group_0": run})
    trained = mixtures.settings["trained"]
    assert trained == {"group_0": run.as_dict()}
    with pytest.raises(EstimationError, match="The loss of 'a' in the captured_losses of an observed run .* found -1"):
        ObservedRun({"a": 1.0}, {"a": 0.5}, {"a": -1.0})


def test_penalty_of_a_training_through_a_small_part_of_the_rows_is_found():
    train, validation = world()
    free = SubsetEstimator(train, validation)
    for scale in (3e4, 4e6):
        losses = dict(zip(NAMES, free.predict(np.ones((1, 4)), l2_scale=scale).loss[0].tolist()))
        fitted = SubsetEstimator(train, validation, observed_runs=[ObservedRun(ALL, losses)]).regularization.l2_scale
        assert fitted == pytest.approx(scale, rel=0.05)
