"""Groups whose trainings have lengths of their own."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from helpers.captures import capture
from helpers.feature_tables import NAMES, world
from hf_ensemble import TrainingRecipe
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.estimate import ObservedRun, SubsetEstimator
from hf_ensemble.select import DataSelector, Grouping, predicted_losses
from hf_ensemble.select.groups import mixture_groups
from hf_ensemble.select.groups.adapters_at_hand import AdaptersAtHand
from hf_ensemble.select.groups.each_alone import TasksAlone
from hf_ensemble.select.groups.mixture_search import MixturePool, MixtureSet, search_mixtures
from hf_ensemble.select.groups.mixture_steps import MixtureSteps
from hf_ensemble.select.groups.optimism import SetComparison

RECIPE = TrainingRecipe([0.02] * 40, 8, 300.0)
OTHERS = (0.25, 0.5, 2.0)
OPTIONS = {"method": "mixtures", "group_initialization": "baseline", "affinity_subsets": 5}
GOAL = np.full(4, 0.25)


@pytest.fixture(scope="module")
def estimator():
    return SubsetEstimator(*world(), recipe=RECIPE, other_lengths=OTHERS)


@pytest.fixture(scope="module")
def selector(estimator):
    return DataSelector(estimator)


def cost_of(estimator, grouping):
    names = [name for name in grouping.groups if name != grouping.baseline_group]
    mixtures = [[grouping.mixtures[name].get(task, 0.0) for task in NAMES] for name in names]
    lengths = np.array([grouping.length_of(name) for name in names])
    return 1 + float(estimator.training_cost(np.array(mixtures).reshape(-1, 4), lengths).sum())


@pytest.mark.parametrize("budget", [1.1, 1.5, 2.0, 3.0])
def test_trainings_of_all_lengths_keep_within_the_budget(estimator, selector, budget):
    grouping = selector.group(None, compute_budget=budget, **OPTIONS)
    assert grouping.cost == pytest.approx(cost_of(estimator, grouping)) and grouping.cost <= budget + 1e-6
    assert set(grouping.lengths.values()) <= set(estimator.lengths)
    losses = predicted_losses(estimator, grouping)
    own = [losses[row, NAMES.index(task)] for row, tasks in enumerate(grouping.groups.values()) for task in tasks]
    point = next(one for one in grouping.cost_curve if one["expected_loss"] == grouping.expected_loss)
    assert point["predicted_loss"] == pytest.approx(np.mean(own))


def test_small_budgets_gain_more_with_them(selector):
    plain = DataSelector(SubsetEstimator(*world(), recipe=RECIPE))
    for budget in (1.1, 1.3, 1.5):
        without = min(point["predicted_loss"] for point in _curve(plain, budget))
        assert min(point["predicted_loss"] for point in _curve(selector, budget)) <= without + 1e-9
    # A quarter of a task's training is all that this pays for: a task is a quarter of all rows.
    assert len(_curve(plain, 1.1)) == 1 < len(_curve(selector, 1.1))


def _curve(selector, budget):
    return selector.group(None, compute_budget=budget, **OPTIONS).cost_curve


def test_tasks_alone_are_as_good_as_any_of_their_cost(estimator):
    at_hand = AdaptersAtHand.of(estimator, {}, True, True)
    sets = TasksAlone(estimator, at_hand, GOAL).some(4, None)
    lengths = sorted(estimator.lengths)
    losses = [
        at_hand.losses[0],
        *(estimator.predict(np.eye(4), lengths=np.full(4, own)).loss.diagonal() for own in lengths),
    ]
    shares = estimator.training_cost(np.eye(4))
    every = []
    for choice in itertools.product(range(len(losses)), repeat=4):
        cost = sum(share * ([0.0, *lengths][own]) for share, own in zip(shares, choice))
        every.append((cost, np.mean([losses[own][task] for task, own in enumerate(choice)])))
    assert len(sets) > 3
    for one in sets:
        found = float(GOAL @ one.loss)
        assert found == pytest.approx(min(loss for cost, loss in every if cost <= one.cost + 1e-9), abs=1e-9)


def test_tasks_alone_are_served_by_their_own_adapters(estimator):
    at_hand = AdaptersAtHand.of(estimator, {}, True, True)
    for one in TasksAlone(estimator, at_hand, GOAL).some(2, 0.6):
        assert len(one) <= 2 and one.cost <= 0.6
        alone = one.weights.argmax(axis=1)
        assert one.serving[alone].tolist() == list(range(len(one)))
        assert (np.delete(one.serving, alone) == -1).all()
        assert one.cost == pytest.approx(float(estimator.training_cost(one.weights, one.lengths).sum()))


def test_a_choice_keeps_its_lengths_and_is_repeated(tmp_path, estimator, selector):
    grouping = selector.group(None, compute_budget=1.3, **OPTIONS)
    assert set(grouping.lengths) == set(grouping.groups) and min(grouping.lengths.values()) < 1
    grouping.save(tmp_path / "groups.json")
    assert Grouping.load(tmp_path / "groups.json") == grouping
    assert selector.repeat(grouping) == grouping
    assert grouping.provenance["other_lengths"] == list(OTHERS)


def test_groups_of_other_methods_have_the_selector_s_own_length():
    half = DataSelector(SubsetEstimator(*world(), recipe=RECIPE, length=0.5))
    for method in ("direct", "mixtures"):
        grouping = half.group(2, method, affinity_subsets=5)
        assert set(grouping.lengths.values()) == {0.5}


def test_adapters_that_are_trained_are_of_one_length(selector):
    trained = {"group_0": ObservedRun({"a": 1.0}, dict.fromkeys(NAMES, 0.6))}
    with pytest.raises(ConfigurationError, match=r"knows others, \[0.25, 0.5, 2.0\], too. Leave other_lengths out"):
        selector.group(None, trained=trained, compute_budget=2.0, **OPTIONS)


def test_without_a_recipe_trainings_are_of_one_length(tmp_path, caplog):
    store = capture(tmp_path / "store")
    with caplog.at_level("WARNING", "hf_ensemble"):
        selector = DataSelector.from_store(store, None, 20, length=0.5, other_lengths=OTHERS)
    assert selector.estimator.lengths == (0.5,)
    assert "was captured without a recipe" in caplog.text and "has the length 0.5" in caplog.text


def test_a_set_is_compared_at_the_lengths_of_its_trainings(estimator):
    """Its standard error is that of an estimator of this length alone, and of the same mixtures at others another."""
    at_hand = AdaptersAtHand.of(estimator, {}, True, True)
    comparison, start = SetComparison(estimator, at_hand, GOAL), np.zeros(60)
    weights, errors = np.eye(4)[:2], {}
    for length in (0.25, 2.0):
        lengths = np.full(2, length)
        one = MixtureSet(weights, np.zeros(4), np.array([0, 1, -1, -1]), 0.0, lengths)
        errors[length] = comparison.from_one_adapter(one, start)
        alone = SubsetEstimator(*world(), recipe=RECIPE, length=length)
        other = SetComparison(alone, AdaptersAtHand.of(alone, {}, True, True), GOAL)
        assert errors[length] == pytest.approx(other.from_one_adapter(one_of(alone, one), start), rel=1e-3)
    assert errors[0.25] < 0.8 * errors[2.0]


def one_of(estimator, found):
    return replace(found, lengths=np.full(len(found), estimator.length))


def test_mixtures_are_improved_at_their_lengths(estimator):
    served, start = np.array([True, False, False, False]), np.eye(4)[0]
    steps = MixtureSteps(estimator, GOAL, 4, 8)
    found = {}
    for length in (0.25, 2.0):
        alone = SubsetEstimator(*world(), recipe=RECIPE, length=length)
        # A price per unit of cost: longer trainings cost more.
        found[length] = steps.improved(served, start, 0.05, length)
        assert found[length] == pytest.approx(
            MixtureSteps(alone, GOAL, 4, 8).improved(served, start, 0.05, length), abs=0.02
        )
    assert not np.allclose(found[0.25], found[2.0], atol=0.05)


def test_lengths_that_are_all_longer_are_searched_too():
    short = SubsetEstimator(*world(), recipe=RECIPE, length=0.25, other_lengths=(1.0, 2.0))
    at_hand = AdaptersAtHand.of(short, {}, True, True)
    pool = MixturePool(short, GOAL, at_hand.losses, 4)
    own, longer = search_mixtures(pool, MixtureSteps(short, GOAL, 4, 8), 2.0)
    assert {length for one in own for length in one.lengths} == {0.25}
    assert {length for one in longer for length in one.lengths} > {0.25}
    assert GOAL @ longer[-1].loss < GOAL @ own[-1].loss - 0.01


def test_what_was_chosen_has_an_optimism_of_its_own(selector, estimator, monkeypatch):
    """Sets of one length, of any, and of tasks alone are compared, and only each task alone has no optimism."""
    monkeypatch.setattr(mixture_groups, "_front", lambda points, shown: points)
    curve = _curve(selector, 2.0)
    assert [point["optimism"] for point in curve if point["num_groups"] == 4 and point["cost"] == 2.0].count(0.0) == 1
    assert all(point["optimism"] > 0 for point in curve if 0 < point["num_groups"] < 4)
    at_hand = AdaptersAtHand.of(estimator, {}, True, True)
    for one in TasksAlone(estimator, at_hand, GOAL).some(4, 1.0):
        assert any(
            point["cost"] == pytest.approx(1 + one.cost) and point["predicted_loss"] == pytest.approx(GOAL @ one.loss)
            for point in curve
        )


@pytest.mark.parametrize("most", [1, 2, 3])
def test_fewer_adapters_go_to_tasks_that_gain_most(estimator, most):
    at_hand = AdaptersAtHand.of(estimator, {}, True, True)
    losses = np.stack(
        [estimator.predict(np.eye(4), lengths=np.full(4, own)).loss.diagonal() for own in estimator.lengths]
    )
    gains = np.sort(np.maximum(at_hand.losses[0] - losses.min(axis=0), 0))[::-1]
    sets = TasksAlone(estimator, at_hand, GOAL).some(most, None)
    assert max(len(one) for one in sets) <= most
    assert GOAL @ sets[-1].loss == pytest.approx(GOAL @ at_hand.losses[0] - gains[:most].sum() / 4)
    assert not TasksAlone(estimator, at_hand, GOAL).some(most, 0.0)
