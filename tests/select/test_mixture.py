"""Sampling weights by the gradient of the predicted loss."""

from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset

from helpers.feature_tables import NAMES, world
from hf_ensemble import DataSelector, Mixture, ObservedRun, SubsetEstimator, TaskSet, TrainingRecipe
from hf_ensemble.errors import ConfigurationError, EstimationError

RECIPES = {
    "no recipe": None,
    "adam": TrainingRecipe([1e-2] * 20, 8, 60.0),
    "fresh LoRA": TrainingRecipe([1e-2] * 20, 8, 60.0, 400.0),
    "gradient descent": TrainingRecipe([1e-2] * 20, 8),
    "fixed steps": TrainingRecipe([1e-2] * 20, 8, 60.0, fixed_steps=True),
}
RUNS = [
    ObservedRun(dict.fromkeys(NAMES, 1.0), dict(zip(NAMES, [0.55, 0.6, 0.65, 0.6]))),
    ObservedRun({"a": 1.0}, dict(zip(NAMES, [0.55, 0.62, 0.66, 0.7]))),
]


@pytest.fixture(scope="module")
def selector():
    return DataSelector(SubsetEstimator(*world()))


@pytest.mark.parametrize("asked", [500, 60, None])
def test_the_search_looks_at_as_many_rows_as_it_is_told(selector, asked, monkeypatch):
    sampled, looked_at = SubsetEstimator.sampled, []

    def recorded(estimator, most_rows, seed=0):
        looked_at.append(most_rows)
        return sampled(estimator, most_rows, seed)

    monkeypatch.setattr(SubsetEstimator, "sampled", recorded)
    mixture = selector.mixture("a", search_rows=asked)
    selection = selector.select("a", "mixture", search_rows=asked)
    # There are 160 rows.
    assert looked_at == ([60, 60] if asked == 60 else [])
    assert mixture.settings["search_rows"] == selection.settings["search_rows"] == asked
    assert selector.repeat(mixture).weights == mixture.weights


@pytest.mark.parametrize("tokens", [False, True], ids=["one token", "several tokens"])
@pytest.mark.parametrize("runs", [[], RUNS], ids=["no runs", "runs"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_derivatives_equal_finite_differences(recipe, runs, tokens):
    estimator = SubsetEstimator(*world(tokens=tokens), recipe=RECIPES[recipe], observed_runs=runs)
    if runs:
        estimator.calibration = replace(estimator.calibration, curvature=1.5)
    targets = np.array([1.0, 0.0, 0.5, 0.0])
    weights = np.array([0.9, 0.4, 0.2, 0.7])
    value, gradient = estimator.weighted_loss(weights, targets)
    step = 1e-3
    for index, row in enumerate(np.eye(4)):
        # Of fourth order.
        far, near = (
            [estimator.weighted_loss(weights + sign * width * row, targets)[0] for sign in (1, -1)]
            for width in (2 * step, step)
        )
        expected = (8 * (near[0] - near[1]) - (far[0] - far[1])) / (12 * step)
        assert gradient[index] == pytest.approx(expected, rel=1e-4, abs=1e-7)
    # At weights of zero the derivative is that of beginning to draw.
    without = np.array([1.0, 0.4, 0.0, 0.7])
    value, gradient = estimator.weighted_loss(without, targets)
    one, two = (estimator.weighted_loss(without + [0, 0, step * size, 0], targets)[0] for size in (1, 2))
    assert gradient[2] == pytest.approx((4 * one - two - 3 * value) / (2 * step), rel=0.02)


@pytest.mark.parametrize("runs", [[], RUNS], ids=["no runs", "runs"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_its_value_is_the_prediction_where_the_largest_weight_is_one(recipe, runs):
    estimator = SubsetEstimator(*world(), recipe=RECIPES[recipe], observed_runs=runs)
    targets, weights = np.array([1.0, 0.0, 0.5, 0.0]), np.array([1.0, 0.4, 0.0, 1.0])
    value, _ = estimator.weighted_loss(weights, targets)
    assert value == pytest.approx(float(estimator.predict(weights).loss[0] @ targets), abs=1e-7)


def test_a_mixture_is_better_than_what_it_starts_from(selector):
    for targets in ("a", ["a", "d"], {"b": 2.0, "c": 0.3}):
        mixture = selector.mixture(targets)
        assert mixture.predicted_loss <= mixture.subset_loss
        goal = np.array([mixture.targets.get(name, 0.0) for name in NAMES])
        losses = selector.estimator.predict_subsets([mixture.weights, mixture.subset]).loss @ goal
        assert losses == pytest.approx([mixture.predicted_loss, mixture.subset_loss], abs=1e-6)
        assert max(mixture.weights.values()) == 1.0 and min(mixture.weights.values()) > 0
        assert sum(mixture.probabilities.values()) == pytest.approx(1.0)
        assert mixture.probabilities.keys() == mixture.weights.keys()


def test_targets_that_contradict_each_other_share(selector):
    """Between a and its opposite c, the best is neither whole: fewer rows of the lesser target."""
    mixture = selector.mixture({"a": 1.0, "c": 0.4})
    assert mixture.predicted_loss < mixture.subset_loss - 1e-3
    assert any(0.05 < weight < 0.95 for weight in mixture.weights.values())


def test_it_takes_what_helps_and_leaves_what_contradicts(selector):
    """Task b asks for what a asks for, c for the opposite."""
    mixture = selector.mixture("a")
    assert mixture.weights["b"] > 0.3 and mixture.weights.get("c", 0.0) < 0.05
    assert "predicted" in mixture.summary and "trust" in mixture.summary


def test_no_other_weights_are_better(selector):
    mixture = selector.mixture("a")
    weights = np.random.default_rng(0).random((400, 4))
    assert mixture.predicted_loss <= selector.estimator.predict(weights).loss[:, 0].min() + 1e-6


def test_caps_bound_the_auxiliary_tasks(selector):
    assert selector.mixture("a", caps=0.0).weights == {"a": 1.0}
    assert max(weight for name, weight in selector.mixture("a", caps=0.2).weights.items() if name != "a") <= 0.2
    named = selector.mixture("a", caps={"b": 0.0}).weights
    assert "b" not in named and named["a"] > 0


def test_as_a_selection_it_names_the_helpers(selector):
    mixture, selection = selector.mixture("a"), selector.select("a", "mixture")
    assert selection.tasks[:2] == ["a", "b"] and selection.weights == pytest.approx(mixture.weights)
    assert selection.path[-1]["predicted_loss"] == mixture.predicted_loss <= selection.path[0]["predicted_loss"]
    assert selection.scores["b"] < selection.scores["c"] and set(selection.scores) == set("bcd")
    assert selector.select("a", "mixture", max_auxiliary=0).tasks == ["a"]
    assert len(selector.select("a", "mixture", max_auxiliary=1).auxiliary) == 1
    assert set(selector.select("a").weights.values()) == {1.0}


def test_caps_hold_where_a_shorter_training_would_do():
    estimator = SubsetEstimator(*world())
    # So long a training that less of every row is better.
    estimator.regularization = replace(estimator.regularization, l2_scale=1e-3)
    mixture = DataSelector(estimator).mixture("a", caps=0.3)
    assert max(mixture.weights.values()) == 1.0
    assert all(weight <= 0.3 for name, weight in mixture.weights.items() if name != "a")


def test_predictions_of_a_mixture_undo_the_shared_sampling_weights():
    shared = {"a": 0.5, "b": 2.0, "d": 3.0}
    selector = DataSelector(SubsetEstimator(*world(), sampling_weights=shared))
    goals = {"a": 1.0, "c": 0.4}
    mixture = selector.mixture(goals)
    relative = {name: weight / shared.get(name, 1.0) for name, weight in mixture.weights.items()}
    loss = selector.estimator.predict_subsets([relative]).loss[0] @ [1.0, 0.0, 0.4, 0.0]
    assert mixture.predicted_loss == pytest.approx(loss, abs=1e-6)
    own = selector.mixture("a").weights
    relative = {name: weight / shared.get(name, 1.0) for name, weight in own.items()}
    assert selector.select("a", "mixture").weights == pytest.approx(relative)


def test_sampling_weights_are_replaced():
    free = DataSelector(SubsetEstimator(*world()))
    weighted = SubsetEstimator(*world(), sampling_weights={"a": 0.5, "b": 2.0})
    weighted.regularization = free.estimator.regularization
    assert DataSelector(weighted).mixture("a", caps=0.5).weights == pytest.approx(
        free.mixture("a", caps=0.5).weights, abs=1e-2
    )


def test_it_survives_json_and_feeds_the_trainers(selector, tmp_path):
    mixture = selector.mixture("a", caps=0.5)
    mixture.save(tmp_path / "mixture.json")
    assert Mixture.load(tmp_path / "mixture.json") == mixture
    rows = {name: Dataset.from_list([{"prompt": "sum 1 2 =", "completion": "3"}]) for name in mixture.weights}
    tasks = TaskSet.from_datasets(rows, rows)
    assert tasks.reweighted(mixture.weights).sampling_weights == mixture.weights


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("x",), r"Unknown targets \['x'\]"),
        (([],), "at least one target"),
        (({"a": 0.0},), "weight of the target 'a' has to be a finite number above 0"),
        (("a", 1.5), "The cap of .* at least 0 and at most 1"),
        (("a", {"x": 0.5}), "Unknown tasks in caps"),
    ],
)
def test_bad_input_is_named(selector, arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        selector.mixture(arguments[0], **({"caps": arguments[1]} if len(arguments) > 1 else {}))


@pytest.mark.parametrize("weights", [[0, 0, 0, 0], [1, -0.1, 0, 0], [1.2, 0, 0, 0], [np.nan, 1, 1, 1], [1, 1]])
def test_bad_weights_are_refused(selector, weights):
    with pytest.raises(EstimationError, match="weights from 0 to 1"):
        selector.estimator.weighted_loss(np.array(weights, dtype=float), np.ones(4))
