"""Scores of single training rows."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from helpers import oracles, toy
from helpers.feature_tables import NAMES, world
from hf_ensemble import DataSelector, ExampleScores, FeatureTable, ObservedRun, SubsetEstimator, TaskSet
from hf_ensemble.errors import ConfigurationError, EstimationError, TaskError

RUN = [ObservedRun(dict.fromkeys(NAMES, 1.0), dict.fromkeys(NAMES, 0.6))]


@pytest.fixture(scope="module")
def selector():
    return DataSelector(SubsetEstimator(*world()))


@pytest.mark.parametrize("tokens", [False, True], ids=["one token", "several tokens"])
def test_influence_is_what_drawing_a_row_more_changes(tokens):
    """Against the optimum of the surrogate in which one row's weight is another, solved from scratch."""
    train, validation = world(tokens=tokens)
    estimator = SubsetEstimator(train, validation)
    of_tokens = train.num_tokens if tokens else np.ones(len(train))
    x, xv = (estimator.reduction.apply(table.features) for table in (train, validation))
    weights, targets = np.array([1.0, 0.5, 0.0, 0.8]), np.array([1.0, 0.0, 0.5, 0.0])
    l2 = estimator.regularization.l2_scale / (weights @ estimator.counts)
    found = estimator.example_influence(weights, targets)
    of_row = (targets / np.bincount(validation.task))[validation.task]

    def loss(row_weights):
        w = oracles.fit(x, train.margin, row_weights * of_tokens, l2)
        return of_row @ np.logaddexp(0, -(validation.margin + xv @ w))

    for row in (0, 45, 90, 159):
        more, less = (weights[train.task] + sign * 1e-2 * np.eye(len(x))[row] for sign in (1, -1))
        # Drawing at less than nothing is the same line.
        assert found[row] == pytest.approx(-(loss(more) - loss(less)) / 2e-2, rel=2e-2, abs=1e-7)


def test_rows_may_lie_in_any_order(selector):
    train, validation = world()
    order = np.random.default_rng(0).permutation(len(train.task))
    arrays = (getattr(train, name)[order] for name in ("features", "margin", "task"))
    mixed = FeatureTable(*arrays, train.task_names, train.example_id[order])
    estimator = SubsetEstimator(mixed, validation)
    estimator.regularization = selector.estimator.regularization
    targets = np.array([1.0, 0.0, 0.5, 0.0])
    expected = selector.estimator.example_influence(np.ones(4), targets)
    assert np.allclose(estimator.example_influence(np.ones(4), targets), expected[order], rtol=1e-4, atol=1e-8)
    assert estimator.training_ids == tuple(selector.estimator.training_ids[index] for index in order)


def noisy_world(seed=0, n=400, d=20, noisy=0.25):
    """One task whose answers a hidden direction decides; of some rows the answer is turned around."""
    generator = np.random.default_rng(seed)
    hidden = generator.normal(size=d)

    def table(rows, share):
        x = generator.normal(size=(rows, d))
        x *= np.sign(x @ hidden + 0.5 * generator.normal(size=rows))[:, None]
        wrong = generator.random(rows) < share
        x[wrong] *= -1
        ids = np.array([f"{'wrong' if bad else 'right'}-{i}" for i, bad in enumerate(wrong)])
        return FeatureTable(x.astype(np.float32), np.zeros(rows), np.zeros(rows, dtype=int), ("a",), ids)

    run = [ObservedRun({"a": 1.0}, {"a": 0.5})]
    return SubsetEstimator(table(n, noisy), table(200, 0.0), observed_runs=run)


def test_turned_labels_are_found():
    scores = DataSelector(noisy_world()).score_examples("a").scores["a"]
    wrong = [name.startswith("wrong") for name in scores]
    assert 0.2 < np.mean(wrong) < 0.3
    assert roc_auc_score(wrong, [-score for score in scores.values()]) > 0.9


def test_worst_and_harmful_rows_are_named(selector, tmp_path):
    scores = selector.score_examples("a", ["a", "b"])
    assert scores.weights == {"a": 1.0, "b": 1.0} and set(scores.scores) == set(NAMES)
    worst = scores.worst(0.25)
    assert all(len(ids) == 10 for ids in worst.values())
    values = scores.scores["b"]
    assert list(worst["b"]) == sorted(values, key=values.get)[:10]
    first = next(iter(worst["c"].values()))
    assert "rank 1 of 40 from the bottom" in first and "predicted to raise the loss of a" in first
    assert max(values[example] for example in worst["b"]) <= min(
        value for example, value in values.items() if example not in worst["b"]
    )
    assert list(scores.worst(0.1, ["c"])) == ["c"] and scores.worst(0.0)["a"] == {}
    assert {example for example, value in values.items() if value < 0} == set(scores.harmful()["b"])
    # What contradicts a harms it.
    assert np.mean(list(scores.scores["c"].values())) < np.mean(list(scores.scores["b"].values()))
    scores.save(tmp_path / "scores.json")
    assert ExampleScores.load(tmp_path / "scores.json") == scores


def test_rows_are_left_out_by_their_ids():
    tasks = TaskSet.from_datasets(toy.sft_tasks(), sampling_weights={"sums": 2.0})
    ids = tasks["sums"].splits["train"]["example_id"][:]
    kept = tasks.without({"sums": ids[:3]})
    assert kept["sums"].splits["train"]["example_id"][:] == ids[3:]
    assert kept.sampling_weights == tasks.sampling_weights and kept.fingerprint != tasks.fingerprint
    others = [name for name in tasks if name != "sums"]
    assert all(kept[name] is tasks[name] for name in others)
    assert tasks.without({"sums": []}).fingerprint == tasks.fingerprint
    for examples, message in (
        ({"x": []}, "Unknown tasks"),
        ({"sums": ["none"]}, "no training rows with the ids"),
        ({"sums": ids}, "no training rows left"),
    ):
        with pytest.raises(TaskError, match=message):
            tasks.without(examples)


def test_bad_input_is_named(selector):
    scores = selector.score_examples("a")
    for share in (-0.1, 1.1):
        with pytest.raises(ConfigurationError, match="share has to be a finite number of at least 0 and at most 1"):
            scores.worst(share)
    with pytest.raises(ConfigurationError, match="Unknown tasks"):
        scores.worst(0.1, ["x"])
    with pytest.raises(ConfigurationError, match="Unknown target"):
        selector.score_examples("x")
    with pytest.raises(EstimationError, match="Unknown tasks"):
        selector.score_examples("a", ["x"])
    with pytest.raises(EstimationError, match="from 0 to 1"):
        selector.score_examples("a", {"a": 2.0, "b": -1.0})


def test_sampling_weights_are_part_of_the_training():
    plain = DataSelector(SubsetEstimator(*world(), observed_runs=RUN))
    weighted = DataSelector(SubsetEstimator(*world(), observed_runs=RUN, sampling_weights={"b": 4.0}))
    weighted.estimator.regularization = plain.estimator.regularization
    weighted.estimator.calibration = plain.estimator.calibration
    found = weighted.score_examples("a", ["a", "b"])
    assert found.weights == {"a": 0.25, "b": 1.0}
    expected = plain.score_examples("a", {"a": 1.0, "b": 4.0}).scores["c"]
    assert found.scores["c"] == pytest.approx(expected, rel=1e-6)
