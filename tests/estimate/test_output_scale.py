"""Predicted losses with a scale of each task's outputs: the scale, its derivatives, and an estimator of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from hf_ensemble.errors import EstimationError
from hf_ensemble.estimate import ObservedRun, SubsetEstimator
from hf_ensemble.estimate.output_scale import MAX_LOG_SCALE, SCALE_SPREAD, ScaledRows
from hf_ensemble.estimate.validation_rows import ValidationRows
from hf_ensemble.store import FeatureTable
from hf_ensemble.tasks import other_entropy

COUNTS = np.array([40, 7, 1, 25])
STARTS = np.cumsum(COUNTS) - COUNTS


def rows_of(seed, sharpness=1.0):
    rng = np.random.default_rng(seed)
    return sharpness * rng.normal(1.0, 2.0, (3, COUNTS.sum())), rng.uniform(0.0, 1.5, COUNTS.sum())


def by_hand(z, entropy, size=None):
    """Loss and log-scale of one task's rows, of which `size` are known to the prior."""

    def scaled_loss(log_scale):
        scale = np.exp(log_scale)
        return np.logaddexp(0.0, -(scale * z + (scale - 1) * entropy)).mean()

    def objective(log_scale):
        return scaled_loss(log_scale) + log_scale**2 / (2 * (size or len(z)) * SCALE_SPREAD**2)

    found = minimize_scalar(objective, bounds=(-2, 2), method="bounded", options={"xatol": 1e-9})
    return scaled_loss(found.x), found.x


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 30.0])
def test_every_task_has_the_most_probable_scale(sharpness):
    z, entropy = rows_of(0, sharpness)
    rows = ScaledRows(entropy, COUNTS)
    log_scales = rows.log_scales(z)
    losses = np.add.reduceat(np.logaddexp(0.0, -rows.scaled(z)), STARTS, axis=1) / COUNTS
    for task, (start, count) in enumerate(zip(STARTS, COUNTS)):
        part = slice(start, start + count)
        for own in range(len(z)):
            loss, log_scale = by_hand(z[own, part], entropy[part])
            assert log_scales[own, task] == pytest.approx(log_scale, abs=1e-4)
            assert losses[own, task] == pytest.approx(loss, abs=2e-5)


def test_the_search_for_a_scale_ends_where_newtons_steps_do_not():
    # Steps of Newton's method go to and fro between two kinks here.
    z, entropy = np.array([[-2.57, -3.63, -1.54]]), np.array([8.33, 11.39, 9.92])
    rows = ScaledRows(entropy, np.array([3]))
    assert rows.log_scales(z)[0, 0] == pytest.approx(by_hand(z[0], entropy)[1], abs=1e-4)
    rng = np.random.default_rng(0)
    for _ in range(200):
        z, entropy = rng.normal(-3, 3, (4, 3)), rng.uniform(6, 12, 3)
        rows = ScaledRows(entropy, np.array([3]))
        log_scales, objectives = rows.log_scales(z), []
        for shift in (-1e-4, 0.0, 1e-4):
            at = np.clip(log_scales + shift, -MAX_LOG_SCALE, MAX_LOG_SCALE)
            losses = np.logaddexp(0.0, -rows.scaled(z, at)).mean(axis=1, keepdims=True)
            objectives.append(losses + at**2 / (2 * 3 * SCALE_SPREAD**2))
        assert (objectives[1] <= np.minimum(objectives[0], objectives[2]) + 1e-8).all()


def test_scales_have_bounds():
    # Answers that no row has wrong, and many that are wrong by far.
    for z in (np.full((1, 400), 1e-3), np.tile([-300.0, 1.0], 200)[None]):
        rows = ScaledRows(np.zeros(400), np.array([400]))
        log_scale = rows.log_scales(z)[0, 0]
        assert abs(log_scale) <= MAX_LOG_SCALE and np.isfinite(rows.losses_with_slopes(z[0])[1]).all()
    assert log_scale == pytest.approx(-MAX_LOG_SCALE, abs=1e-4)


def test_log_odds_are_those_of_scaled_logits_where_the_others_are_alike():
    """Two answers, or others that are equally likely; else to first order in the change of the scale."""
    rng = np.random.default_rng(1)
    targets = torch.from_numpy(rng.integers(0, 4, 50))

    def log_odds(logits):
        log_prob = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        return log_prob - torch.log(-torch.expm1(log_prob))

    of_target = torch.nn.functional.one_hot(targets, 4) * torch.from_numpy(rng.normal(size=50))[:, None]
    alike = of_target + torch.from_numpy(rng.normal(size=50))[:, None]
    entropy = other_entropy(alike, targets)
    assert entropy == pytest.approx(np.log(3), abs=1e-5)
    for scale in (0.2, 3.0):
        expected = log_odds(scale * alike)
        assert torch.allclose(scale * log_odds(alike) + (scale - 1) * entropy, expected, atol=1e-4)
    logits = 2 * torch.from_numpy(rng.normal(size=(50, 4)))
    entropy = other_entropy(logits, targets)
    slope = (log_odds(1.001 * logits) - log_odds(0.999 * logits)) / 0.002
    assert torch.allclose(slope, log_odds(logits) + entropy, atol=1e-3)
    # Labels that a task has not are no answers, and a single label has no other.
    logits[:, 3], known = float("-inf"), targets.clamp(max=2)
    others = logits[:, :3].scatter(1, known[:, None], float("-inf")).softmax(-1)
    by_definition = -torch.xlogy(others, others).sum(-1)
    assert torch.allclose(other_entropy(logits, known), by_definition.float(), atol=1e-5)
    assert other_entropy(logits[:, :1], torch.zeros(50, dtype=torch.long)).tolist() == [0.0] * 50


def test_slopes_are_those_of_finite_differences():
    z, entropy = rows_of(2)
    rows = ScaledRows(entropy, COUNTS)
    losses, slopes = rows.losses_with_slopes(z[0])

    def total(own):
        return (np.add.reduceat(np.logaddexp(0.0, -rows.scaled(own[None])[0]), STARTS) / COUNTS).sum()

    assert losses.sum() == pytest.approx(total(z[0]))
    for row in range(0, len(entropy), 5):
        step = np.zeros(len(entropy))
        step[row] = 1e-3
        assert slopes[row] == pytest.approx((total(z[0] + step) - total(z[0] - step)) / 2e-3, abs=2e-6)


def tables(with_entropy=True, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for count in (60, 24):
        task = np.repeat(np.arange(3), count)
        features = rng.normal(size=(len(task), 12)) + np.eye(12)[task]
        ids = np.arange(len(task)).astype(str)
        entropy = rng.uniform(0, 1, len(task)).astype(np.float32) if with_entropy else None
        margin = rng.normal(0.5, 1.0, len(task)).astype(np.float32)
        features = features.astype(np.float32)
        found.append(FeatureTable(features, margin, task, ("a", "b", "c"), ids, other_entropy=entropy))
    return found


def test_outcomes_do_not_depend_on_how_rows_are_put_together():
    _, validation = tables()
    coefficients = np.random.default_rng(3).normal(size=(4, 12))
    rows = ValidationRows(validation, validation.features)
    whole, plain = rows.scaled().outcomes(coefficients), rows.outcomes(coefficients)
    other = validation.of_rows(np.random.default_rng(4).permutation(len(validation)))
    shuffled = ValidationRows(other, other.features).scaled().outcomes(coefficients)
    needed = np.zeros((4, 3), dtype=bool)
    needed[0, 1] = needed[2, 1] = needed[3, 0] = True
    sparse = rows.scaled().outcomes(coefficients, needed)
    single = rows.scaled().outcomes(coefficients.astype(np.float32))
    for own, other, some, rough, unscaled in zip(whole, shuffled, sparse, single, plain):
        assert np.allclose(own, other) and np.allclose(own[needed], some[needed]) and np.isnan(some[~needed]).all()
        assert np.allclose(own, rough, rtol=1e-4)
        # Accuracies and displacements have no scale.
        assert np.allclose(own, unscaled) == (own is not whole[0])
    scaled = by_hand(validation.margin[:24] + validation.features[:24] @ coefficients[1], validation.other_entropy[:24])
    assert whole[0][1, 0] == pytest.approx(scaled[0], abs=1e-6)


def test_tasks_with_an_answer_of_several_tokens_have_no_scale():
    _, validation = tables()
    entropy = validation.other_entropy.copy()
    entropy[30] = np.nan
    rows = ValidationRows(replace(validation, other_entropy=entropy), validation.features)
    whole = ValidationRows(validation, validation.features).scaled()
    w = np.random.default_rng(3).normal(size=12)
    losses, slopes = rows.scaled().losses_with_slopes(w)
    plain = rows.losses_with_slopes(w)
    assert losses[1] == pytest.approx(plain[0][1]) and slopes[24:48] == pytest.approx(plain[1][24:48])
    assert losses[[0, 2]] == pytest.approx(whole.losses_with_slopes(w)[0][[0, 2]]) and losses[0] != plain[0][0]
    assert rows.scaled().outcomes(w)[0][0] == pytest.approx(losses, abs=1e-9)
    assert rows.can_be_scaled
    nowhere = replace(validation, other_entropy=np.full_like(entropy, np.nan))
    assert not ValidationRows(nowhere, validation.features).can_be_scaled


def test_a_sample_of_rows_has_the_prior_of_all_that_it_stands_for():
    _, validation = tables()
    rows, w = ValidationRows(validation, validation.features).scaled(), np.full(12, 0.5)
    sample = rows.sampled(18)
    few = sample.margins(w)[:6], sample._entropy[:6]
    expected = by_hand(*few, size=24)
    assert sample.outcomes(w)[0][0, 0] == pytest.approx(expected[0], abs=1e-6) != by_hand(*few)[0]
    # So it is where the captured rows are a sample.
    captured = replace(validation.of_rows(np.arange(6)), task_names=("a",), task_sizes=np.array([24]))
    own = ValidationRows(captured, captured.features).scaled()
    expected = by_hand(own.margins(w), captured.other_entropy, size=24)
    assert own.outcomes(w)[0][0, 0] == pytest.approx(expected[0], abs=1e-6)


def test_an_estimator_predicts_losses_with_scales():
    train, validation = tables()
    estimator = SubsetEstimator(train, validation, num_components=12)
    scaled = estimator.scaled()
    mixtures = np.array([[1.0, 1, 1], [1, 0, 0], [0.3, 1, 0]])
    plain, found = estimator.predict(mixtures), scaled.predict(mixtures)
    assert (found.coefficients == plain.coefficients).all() and (found.accuracy == plain.accuracy).all()
    z = validation.margin + validation.features @ (estimator.reduction.components @ plain.coefficients[2]) / (
        estimator.reduction.scale
    )
    expected = [
        by_hand(z[validation.task == task], validation.other_entropy[validation.task == task])[0] for task in range(3)
    ]
    assert found.loss[2] == pytest.approx(expected, abs=1e-5)
    assert scaled.loss_at(plain.coefficients) == pytest.approx(found.loss)
    targets, weights = np.array([0.5, 0.0, 0.5]), np.array([0.6, 1.0, 0.2])
    value, gradient = scaled.weighted_loss(weights, targets)
    assert value == pytest.approx(float(targets @ scaled.predict(weights[None]).loss[0]), abs=1e-6)
    # The largest weight may not be raised further.
    for task in (0, 2):
        step = np.zeros(3)
        step[task] = 1e-3
        low, high = (scaled.weighted_loss(weights + sign * step, targets)[0] for sign in (-1, 1))
        assert gradient[task] == pytest.approx((high - low) / 2e-3, rel=1e-2, abs=1e-6)
    slopes = scaled.single_task_slopes(np.ones(3))
    assert slopes[0] == pytest.approx(scaled.weighted_loss(np.eye(3)[0], np.eye(3)[0])[1], abs=1e-5)
    spread = scaled.score_spread(plain.coefficients[1:2], plain.coefficients[0], np.array([1.0, 0, 0]))
    rows, of_rows = validation.task == 0, []
    for w in plain.coefficients[:2]:
        own = validation.margin[rows] + validation.features[rows] @ (estimator.reduction.components @ w) / (
            estimator.reduction.scale
        )
        scale = np.exp(by_hand(own, validation.other_entropy[rows])[1])
        of_rows.append(np.logaddexp(0.0, -(scale * own + (scale - 1) * validation.other_entropy[rows])))
    assert spread[0] == pytest.approx((of_rows[1] - of_rows[0]).std() / rows.sum() ** 0.5, rel=1e-3)
    for part in (scaled.sampled(30), *scaled.halves()):
        kept = part._validation
        own = part.predict(mixtures)
        assert own.loss == pytest.approx(kept.outcomes(own.coefficients)[0], rel=1e-4)
        assert kept.is_scaled and len(kept) < len(validation)
    assert np.isnan(found.level) and np.isnan(found.loss_low).all()


def test_a_calibration_is_of_moves_with_a_scale_then():
    train, validation = tables()
    run = ObservedRun({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 0.5, "b": 0.45, "c": 0.6})
    estimator = SubsetEstimator(train, validation, num_components=12, observed_runs=[run])
    scaled, mixture = estimator.scaled(), np.array([[0.5, 1.0, 0.2]])
    base = scaled.base_loss()
    surrogate = scaled._validation.outcomes(estimator.predict(mixture).coefficients)[0]
    assert not np.allclose(base, estimator.base_loss())
    assert scaled.predict(mixture).loss == pytest.approx(estimator.calibration.around(base)(surrogate))
    targets = np.array([0.2, 0.3, 0.5])
    value, gradient = scaled.weighted_loss(mixture[0], targets)
    assert value == pytest.approx(float(targets @ scaled.predict(mixture).loss[0]), abs=1e-6)
    for task in (0, 2):
        step = 1e-3 * np.eye(3)[task]
        low, high = (scaled.weighted_loss(mixture[0] + sign * step, targets)[0] for sign in (-1, 1))
        assert gradient[task] == pytest.approx((high - low) / 2e-3, rel=1e-2, abs=1e-6)


def test_features_without_the_entropy_have_no_scale():
    train, validation = tables(with_entropy=False)
    estimator = SubsetEstimator(train, validation, num_components=12)
    assert not estimator.can_be_scaled
    with pytest.raises(EstimationError, match="entropy of the other answers"):
        estimator.scaled()


def test_rows_of_other_tasks_change_nothing():
    _, validation = tables()
    rows = ValidationRows(validation, validation.features).scaled()
    w = np.random.default_rng(5).normal(size=12)
    losses, slopes = rows.losses_with_slopes(w)
    of_two, own = rows.of_tasks(np.array([True, False, True])).losses_with_slopes(w)
    assert of_two == pytest.approx([losses[0], 0.0, losses[2]]) and own == pytest.approx(slopes[validation.task != 1])
    assert losses == pytest.approx(rows.outcomes(w)[0][0])
    plain = ValidationRows(validation, validation.features)
    assert plain.losses_with_slopes(w)[0] == pytest.approx(plain.outcomes(w)[0][0])
