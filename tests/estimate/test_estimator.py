from dataclasses import replace

import numpy as np
import pytest

from helpers import oracles
from helpers.feature_tables import NAMES, world
from hf_ensemble.errors import EstimationError
from hf_ensemble.estimate import ObservedRun, SubsetEstimator
from hf_ensemble.estimate.intervals import IntervalWidth
from hf_ensemble.store import FeatureTable


@pytest.fixture(scope="module")
def estimator():
    return SubsetEstimator(*world())


def test_default_tolerance_predicts_losses_to_1e_5(estimator):
    mixtures = np.array([[1, 0, 0, 0], [1, 1, 0, 1], [0.5, 0, 2, 0]])
    prediction = estimator.predict(mixtures)
    train, validation = world()
    x, xv = (estimator.reduction.apply(table.features) for table in (train, validation))
    m, task, mv, task_v = train.margin, train.task, validation.margin, validation.task
    for row, mixture in enumerate(mixtures):
        epoch = mixture @ estimator.counts / mixture.max()
        l2 = estimator.regularization.l2_scale / epoch
        w = oracles.fit(x, m, mixture[task], l2)
        loss = np.logaddexp(0, -(mv + xv @ w))
        for column in range(4):
            assert abs(prediction.loss[row, column] - loss[task_v == column].mean()) < 1e-5
            correct = ((mv + xv @ w) > 0)[task_v == column].mean()
            assert abs(prediction.accuracy[row, column] - correct) < 1e-9
    assert (prediction.gradient_norm <= 1e-8).all()


def test_long_answers_count_by_their_tokens():
    train, validation = world(tokens=True)
    estimator = SubsetEstimator(train, validation)
    x, xv = (estimator.reduction.apply(table.features) for table in (train, validation))
    mixture = np.array([1.0, 1.0, 0.0, 0.5])
    l2 = estimator.regularization.l2_scale / (mixture @ estimator.counts)
    w = oracles.fit(x, train.margin, mixture[train.task] * train.num_tokens, l2)
    loss = np.logaddexp(0, -(validation.margin + xv @ w))
    found = estimator.predict(mixture).loss[0]
    assert np.abs(found - [loss[validation.task == task].mean() for task in range(4)]).max() < 1e-5
    # Answers of one token each are as good as answers of unknown length.
    one, none = (
        SubsetEstimator(replace(train, num_tokens=tokens), validation).predict(mixture).loss
        for tokens in (np.ones(len(train)), None)
    )
    assert np.array_equal(one, none)


def test_many_mixtures_at_once_equal_one_at_a_time(estimator, monkeypatch):
    mixtures = np.random.default_rng(0).random((30, 4))
    together = estimator.predict(mixtures)
    alone = np.concatenate([estimator.predict(mixture).loss for mixture in mixtures])
    monkeypatch.setattr("hf_ensemble.estimate.surrogate._CHUNK", 500)
    chunked = estimator.predict(mixtures)
    assert np.abs(together.loss - alone).max() < 1e-6
    assert np.abs(together.loss - chunked.loss).max() < 1e-6


def test_row_order_does_not_matter():
    train, validation = world()
    order = np.random.default_rng(0).permutation(len(train))
    shuffled = FeatureTable(
        train.features[order], train.margin[order], train.task[order], NAMES, train.example_id[order]
    )
    subsets = [["a"], ["a", "b"], NAMES]
    one = SubsetEstimator(train, validation).predict_subsets(subsets).loss
    two = SubsetEstimator(shuffled, validation).predict_subsets(subsets).loss
    assert np.abs(one - two).max() < 1e-4


def test_scale_of_the_features_does_not_matter():
    train, validation = world()
    scaled = [FeatureTable(t.features * 1e4, t.margin, t.task, NAMES, t.example_id) for t in (train, validation)]
    subsets = [["a"], ["c", "d"]]
    one = SubsetEstimator(train, validation).predict_subsets(subsets).loss
    two = SubsetEstimator(*scaled).predict_subsets(subsets).loss
    assert np.abs(one - two).max() < 1e-4


def test_helpful_tasks_help_and_harmful_ones_harm(estimator):
    alone, helped, harmed = estimator.predict_subsets([["a"], ["a", "b"], ["a", "c"]]).loss[:, 0]
    assert helped < alone < harmed


def test_penalty_is_found_from_observed_runs():
    train, validation = world()
    truth = SubsetEstimator(train, validation)
    runs = []
    for subset in (NAMES, ["a", "b"]):
        loss = truth.predict([[float(name in subset) for name in NAMES]], l2_scale=7.0).loss[0]
        runs.append(ObservedRun(dict.fromkeys(subset, 1.0), dict(zip(NAMES, loss))))
    found = SubsetEstimator(train, validation, observed_runs=runs).regularization
    assert found.evidence == "observed_runs"
    assert abs(np.log(found.l2_scale / 7.0)) < 0.01
    assert found.criterion < 1e-3


def test_penalty_without_runs_minimises_predicted_validation_loss(estimator):
    own = estimator.regularization
    assert own.evidence == "validation_loss"
    mixtures = np.concatenate([np.eye(4), np.ones((1, 4))])

    def mean_loss(scale):
        loss = estimator.predict(mixtures, l2_scale=scale).loss
        return (np.diag(loss[:4]).mean() + loss[4].mean()) / 2

    assert mean_loss(own.l2_scale) <= min(mean_loss(own.l2_scale * 2), mean_loss(own.l2_scale / 2))


def test_penalty_at_the_edge_is_warned_of(caplog):
    train, validation = world()
    base = dict(zip(NAMES, SubsetEstimator(train, validation).base_loss()))
    unmoved = ObservedRun(dict.fromkeys(NAMES, 1.0), base)
    with caplog.at_level("WARNING"):
        SubsetEstimator(train, validation, observed_runs=[unmoved])
    assert any("edge of its search range" in record.message for record in caplog.records)


def test_base_loss_is_the_loss_without_a_move(estimator):
    far = estimator.predict(np.ones((1, 4)), l2_scale=1e9)
    assert np.abs(far.loss[0] - estimator.base_loss()).max() < 1e-5


def test_sampling_weights_multiply_every_mixture(estimator):
    drawn = np.array([1.0, 3.0, 1.0, 0.5])
    weighted = SubsetEstimator(*world(), sampling_weights=dict(zip(NAMES, drawn)))
    mixtures = np.array([[1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 2, 0]])
    expected = estimator.predict(mixtures * drawn, l2_scale=2.0).loss
    assert np.abs(weighted.predict(mixtures, l2_scale=2.0).loss - expected).max() < 1e-6


def test_mixture_equals_the_subset_it_stands_for(estimator):
    one = estimator.predict_subsets([["a", "c"], {"a": 1.0, "c": 1.0}]).loss
    assert np.abs(one[0] - one[1]).max() < 1e-6


def changed(table, **changes):
    return FeatureTable(**{**{k: getattr(table, k) for k in table.__dataclass_fields__}, **changes})


def test_bad_input_is_named(estimator):
    train, validation = world(rows=5)
    bad = train.features.copy()
    bad[3, 2] = np.nan
    for tables, message in [
        ((changed(train, features=bad), validation), "Row 3"),
        ((changed(train, features=0 * bad[:1].repeat(20, 0).astype(np.float32) * 0), validation), "not finite|nonzero"),
        (
            (train, changed(validation, task=np.where(validation.task == 3, 2, validation.task))),
            "'d' has no validation",
        ),
        ((changed(train, task=np.where(train.task == 1, 2, train.task)), validation), "'b' has no training"),
        ((train, changed(validation, task_names=("a", "b", "c", "e"))), "features of the same tasks"),
    ]:
        with pytest.raises(EstimationError, match=message):
            SubsetEstimator(*tables)
    for mixtures, message in [
        (np.zeros((1, 4)), "empty"),
        (np.array([[1, -1, 0, 0]]), "negative"),
        (np.array([[1, np.inf, 0, 0]]), "finite mixture weights"),
        (np.ones((1, 3)), "over 4 tasks"),
    ]:
        with pytest.raises(EstimationError, match=message):
            estimator.predict(mixtures)
    with pytest.raises(EstimationError, match=r"Unknown tasks \['z'\]"):
        estimator.predict_subsets([["a", "z"]])
    with pytest.raises(EstimationError, match="no finite loss"):
        SubsetEstimator(train, validation, observed_runs=[ObservedRun({"a": 1.0}, {"z": 1.0})])
    with pytest.raises(EstimationError, match="l2 has to be positive"):
        estimator.predict(np.ones((1, 4)), l2_scale=0.0)


def test_intervals_come_from_the_runs_that_calibrate():
    train, validation = world()
    truth = SubsetEstimator(train, validation)
    without = truth.predict(np.ones((1, 4)))
    assert np.isnan(without.loss_low).all() and np.isnan(without.loss_high).all()
    runs = []
    rng = np.random.default_rng(0)
    for subset in (NAMES, ["a", "b"], ["c"]):
        loss = truth.predict([[float(name in subset) for name in NAMES]], l2_scale=7.0).loss[0]
        loss = loss * np.exp(0.05 * rng.normal(size=4))
        runs.append(ObservedRun(dict.fromkeys(subset, 1.0), dict(zip(NAMES, loss))))
    estimator = SubsetEstimator(train, validation, observed_runs=runs)
    prediction = estimator.predict_subsets([run.mixture for run in runs])
    assert (prediction.loss_low < prediction.loss).all() and (prediction.loss < prediction.loss_high).all()
    true = np.array([[run.losses[name] for name in NAMES] for run in runs])
    inside = (prediction.loss_low <= true + 1e-12) & (true <= prediction.loss_high + 1e-12)
    assert inside.mean() >= 0.9
    # Another c is another surrogate, of which the runs say nothing.
    assert np.isnan(estimator.predict(np.ones((1, 4)), l2_scale=1e9).loss_low).all()
    estimator.regularization = replace(estimator.regularization, l2_scale=1e9)
    still = estimator.predict(np.ones((1, 4)))
    assert np.abs(still.loss_high / still.loss_low - 1).max() < 1e-2
    assert estimator.observed_runs == tuple(runs)


def test_linear_margins_are_those_that_the_losses_are_made_of(estimator):
    prediction = estimator.predict_subsets([["a", "d"]])
    margins = estimator.linear_margins(prediction.coefficients[0])
    for column, name in enumerate(NAMES):
        own = np.array([margin for (task, _), margin in margins.items() if task == name])
        assert len(own) == 40
        assert abs(np.logaddexp(0, -own).mean() - prediction.loss[0, column]) < 1e-9


def test_interval_quantile_is_that_of_the_residuals():
    rng = np.random.default_rng(0)
    displacement = rng.uniform(0.1, 2, size=(40, 5))
    residual = 0.1 * rng.normal(size=(40, 5)) * np.sqrt(displacement)
    true = np.exp(residual)
    true[0, 0] = np.nan
    width = IntervalWidth.fit(np.ones((40, 5)), displacement, true)
    # 1.645 standard deviations hold 90 % of a normal distribution.
    assert abs(width.quantile - 0.1645) < 0.02
    low, high = width.around(np.ones((40, 5)), displacement)
    assert abs(np.nanmean(((low <= true) & (true <= high))[~np.isnan(true)]) - 0.9) < 0.02
    assert width.level == 0.9


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 10, 19, 20])
def test_no_interval_promises_more_than_its_residuals_can(count):
    """The nominal level is that of another residual from the same distribution."""
    rng = np.random.default_rng(count)
    scores = rng.exponential(size=(4000, count + 1))
    widths = [IntervalWidth.fit(np.ones((1, count)), np.ones((1, count)), np.exp(row[None, :-1])) for row in scores]
    level = widths[0].level
    if count == 1:
        assert np.isnan(level) and np.isnan(widths[0].quantile)
        return
    assert level == pytest.approx(min(0.9, count / (count + 1)))
    held = np.mean([row[-1] <= width.quantile for row, width in zip(scores, widths)])
    # At least the level, and at most one rank more.
    assert level - 0.02 < held < level + 1 / (count + 1) + 0.02


def test_predictions_tell_the_level_of_their_intervals():
    tables = world()
    some = [ObservedRun(dict.fromkeys(NAMES, 1.0), {"a": 0.6, "b": 0.7})]
    assert SubsetEstimator(*tables, observed_runs=some).predict_subsets([["a"]]).level == pytest.approx(2 / 3)
    all_of_them = [ObservedRun(dict.fromkeys(NAMES, 1.0), dict.fromkeys(NAMES, 0.65))]
    assert SubsetEstimator(*tables, observed_runs=all_of_them).predict_subsets([["a"]]).level == pytest.approx(0.8)
    none = SubsetEstimator(*tables).predict_subsets([["a"]])
    assert np.isnan(none.level) and np.isnan(none.loss_low).all()
