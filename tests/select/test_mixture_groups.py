"""Groups that are weighted mixtures of all tasks, within a budget."""

import functools
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from hf_ensemble import TrainingRecipe
from hf_ensemble.errors import ConfigurationError, HfEnsembleError
from hf_ensemble.estimate import ObservedRun, SubsetEstimator
from hf_ensemble.select import DataSelector, Grouping, predicted_losses
from hf_ensemble.select.groups import mixture_groups
from hf_ensemble.select.groups.adapters_at_hand import AdaptersAtHand
from hf_ensemble.select.groups.facility_location import FacilityLocation
from hf_ensemble.select.groups.optimism import CostPoint
from hf_ensemble.store import FeatureTable


def circle(size=6, rows=12, dim=40, seed=0, turn=1.0, start=None, runs=(), **options):
    """Tasks around a circle: each helps its neighbours and contradicts those opposite, so that there are no blocks.

    With `start`, the features are those of a linear model at these parameters.
    """
    rng = np.random.default_rng(seed)
    first, second = np.linalg.qr(rng.normal(size=(dim, 2)))[0].T
    angles = turn * 2 * np.pi * np.arange(size) / size
    wishes = np.cos(angles)[:, None] * first + np.sin(angles)[:, None] * second
    names = tuple(f"task_{index}" for index in range(size))

    def table(count):
        task = np.repeat(np.arange(size), count)
        features = rng.normal(size=(len(task), dim)) / np.sqrt(dim) + wishes[task]
        ids = np.array([str(index) for index in range(len(task))])
        margin = np.zeros(len(task)) if start is None else features @ start
        return FeatureTable(features.astype(np.float32), margin.astype(np.float32), task, names, ids)

    if start is not None:
        return SubsetEstimator(table(rows), table(60), observed_runs=runs, **options)
    run = ObservedRun({"task_0": 1.0, "task_1": 1.0}, {"task_0": 0.45})
    return SubsetEstimator(table(rows), table(60), observed_runs=[run], **options)


@pytest.fixture(scope="module")
def estimator():
    return circle()


@pytest.fixture(scope="module")
def mixtures(estimator):
    """Groupings of the estimator's tasks by mixtures, each made once."""

    @functools.cache
    def made(num_groups=None, **options):
        return DataSelector(estimator).group(num_groups, "mixtures", affinity_subsets=10, **options)

    return made


def mean_loss(estimator, grouping):
    losses = estimator.predict_subsets(list(grouping.mixtures.values())).loss
    return float(np.mean([losses[:, estimator.task_names.index(task)].min() for task in grouping.task_names]))


def chosen_point(grouping):
    """The set on the curve that was taken."""
    return next(point for point in grouping.cost_curve if point["expected_loss"] == grouping.expected_loss)


def partitions(items):
    if not items:
        yield []
        return
    for smaller in partitions(items[1:]):
        for index, group in enumerate(smaller):
            yield [*smaller[:index], [items[0], *group], *smaller[index + 1 :]]
        yield [[items[0]], *smaller]


def test_where_tasks_conflict_in_no_blocks_mixtures_beat_every_partition(estimator, mixtures):
    everything = [tuple(sorted(group)) for group in itertools.chain(*partitions(list(estimator.task_names)))]
    subsets = sorted(set(everything))
    losses = estimator.predict_subsets(subsets).loss
    own = {
        subset: sum(losses[row, estimator.task_names.index(task)] for task in subset)
        for row, subset in enumerate(subsets)
    }
    best = min(
        sum(own[tuple(sorted(group))] for group in groups) for groups in partitions(list(estimator.task_names))
    ) / len(estimator.task_names)
    grouping = mixtures(6, has_baseline=False)
    assert mean_loss(estimator, grouping) < best - 0.005
    # Each task trains with its neighbours: more rows are drawn than there are.
    assert all(len(grouping.trained_on(group)) > 1 for group in grouping.groups)
    assert grouping.cost > 1.5


@pytest.mark.parametrize("has_baseline", [True, False])
def test_a_larger_budget_costs_more_and_loses_less(estimator, mixtures, has_baseline):
    losses = []
    for budget in (1.0, 4.0):
        grouping = mixtures(compute_budget=budget, has_baseline=has_baseline)
        rows = [
            sum(weight * 12 for weight in mixture.values())
            for mixture in grouping.mixtures.values()
            if not (has_baseline and mixture == dict.fromkeys(estimator.task_names, 1.0))
        ]
        assert grouping.cost == pytest.approx(sum(rows) / 72 + has_baseline) and grouping.cost <= budget + 1e-9
        assert mean_loss(estimator, grouping) == pytest.approx(chosen_point(grouping)["predicted_loss"], abs=1e-6)
        losses.append(mean_loss(estimator, grouping))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.02
    costs = [point["cost"] for point in grouping.cost_curve]
    assert costs == sorted(costs)


def test_it_is_never_worse_than_the_partitions_with_helpers_that_it_starts_from(estimator, mixtures):
    selector = DataSelector(estimator)
    for count in (2, 3):
        start = selector.group(count, overlapping_groups=True, affinity_subsets=10)
        found = mixtures(count, has_baseline=False)
        assert len(found.groups) <= count
        assert mean_loss(estimator, found) <= mean_loss(estimator, start) + 1e-9


@pytest.mark.parametrize("count", [3, 6])
def test_of_many_tasks_the_mixtures_are_found_without_merges(estimator, mixtures, monkeypatch, count):
    selector = DataSelector(estimator)
    expected = mean_loss(estimator, mixtures(count, has_baseline=False))
    monkeypatch.setattr(mixture_groups, "_MAX_MERGED", 0)
    options = {"has_baseline": False, "affinity_subsets": 10}
    found = mean_loss(estimator, selector.group(count, "mixtures", **options))
    assert found == pytest.approx(expected, abs=1e-3)
    partition = min(selector.group(count, **options).predicted_loss.values())
    assert found < partition - 0.003


@pytest.mark.parametrize("price", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("max_open", [2, 4])
def test_facilities_are_those_of_all_sets(price, max_open):
    rng = np.random.default_rng(max_open)
    losses, costs, goal = rng.uniform(size=(10, 7)), rng.uniform(0.2, 1.0, 10), rng.uniform(0.5, 1.0, 7)
    for at_hand in (np.full(7, np.inf), np.full(7, 0.6)):
        problem = FacilityLocation(losses, costs, goal, at_hand, max_open)
        sets = [list(own) for size in range(max_open + 1) for own in itertools.combinations(range(10), size)]
        for max_cost in (np.inf, 1.0):
            allowed = [own for own in sets if costs[own].sum() <= max_cost]
            best = min(problem.value(own, price) for own in allowed)
            starts = [[], *([index] for index in range(10) if costs[index] <= max_cost)]
            found = [problem.search(start, price, max_cost) for start in starts]
            assert all(len(own) <= max_open and costs[own].sum() <= max_cost for own in found)
            assert min(problem.value(own, price) for own in found) == pytest.approx(best)


def test_the_steepest_descent_from_each_task_alone_is_that_of_its_loss(estimator):
    goal = np.linspace(0.5, 1.0, 6)
    slopes = estimator.single_task_slopes(goal)
    for index, own in enumerate(np.eye(6)):
        expected = estimator.weighted_loss(own, own * goal)[1]
        assert np.allclose(slopes[index], expected, atol=1e-5)
        few = estimator.sensitivity(own * goal).to_weights(own, np.arange(6) == index)[1]
        assert few[index] == pytest.approx(expected[index])


def test_what_searching_makes_of_noise_is_taken_off(estimator, mixtures):
    grouping = mixtures(compute_budget=4.0, has_baseline=True)
    assert f"{grouping.expected_loss:.4f}" in grouping.summary
    for point in grouping.cost_curve:
        assert point["optimism"] >= 0 and point["difference_low"] <= point["difference"] <= point["difference_high"]
        together = point["predicted_loss"] + point["optimism"] - point["difference"]
        assert together == pytest.approx(estimator.predict(np.ones((1, 6))).loss.mean())
        assert point["expected_loss"] >= point["predicted_loss"] - 1e-9


def test_tasks_that_agree_need_one_adapter():
    estimator = circle(turn=0.0)
    grouping = DataSelector(estimator).group(None, "mixtures")
    assert grouping.groups == {"group_0": list(estimator.task_names)} and grouping.cost == 1.0
    assert grouping.mixtures == {"group_0": dict.fromkeys(estimator.task_names, 1.0)}
    assert "is enough" in grouping.summary


@pytest.mark.filterwarnings("error")
def test_the_same_rows_under_two_names_are_no_reason_to_warn():
    rng = np.random.default_rng(0)
    features, task = rng.normal(size=(20, 8)).astype(np.float32), np.repeat(np.arange(3), 20)
    rows = np.concatenate([features, features, -features])
    ids = np.array([str(index) for index in range(60)])
    table = FeatureTable(rows, np.zeros(60, dtype=np.float32), task, ("a", "b", "c"), ids)
    run = ObservedRun({"a": 1.0}, {"a": 0.5})
    selector = DataSelector(SubsetEstimator(table, table, observed_runs=[run]))
    grouping = selector.group(None, "mixtures", max_groups=2, compute_budget=3.0, affinity_subsets=5)
    assert grouping.group_of("a") == grouping.group_of("b") != grouping.group_of("c")


def test_sampling_weights_are_what_mixtures_are_multiples_of():
    weights = {f"task_{index}": 1.0 + index for index in range(6)}
    estimator = circle(sampling_weights=weights)
    grouping = DataSelector(estimator).group(None, "mixtures", compute_budget=2.5)
    for mixture in grouping.mixtures.values():
        assert max(mixture.values()) == pytest.approx(1.0)
    assert grouping.cost <= 2.5 + 1e-9
    assert mean_loss(estimator, grouping) == pytest.approx(chosen_point(grouping)["predicted_loss"], abs=1e-6)


def test_with_a_fixed_number_of_steps_every_mixture_costs_a_training():
    recipe = TrainingRecipe([1e-3] * 20, 4, 9.0, fixed_steps=True)
    grouping = DataSelector(circle(recipe=recipe)).group(None, "mixtures", compute_budget=3.0)
    trained = [own for own in grouping.mixtures.values() if own != dict.fromkeys(grouping.task_names, 1.0)]
    assert grouping.cost == 1.0 + len(trained) <= 3.0


def test_it_is_kept_and_made_again(estimator, mixtures, tmp_path):
    selector = DataSelector(estimator)
    grouping = mixtures(compute_budget=2.0, has_baseline=True)
    grouping.save(tmp_path / "groups.json")
    assert Grouping.load(tmp_path / "groups.json") == grouping == selector.repeat(grouping)


def test_settings_that_contradict_are_refused(estimator):
    selector = DataSelector(estimator)
    with pytest.raises(ConfigurationError, match="compute_budget=2.0 limits mixtures"):
        selector.group(2, compute_budget=2.0)
    with pytest.raises(ConfigurationError, match="mixtures overlap by themselves"):
        selector.group(2, "mixtures", overlapping_groups=True)
    with pytest.raises(ConfigurationError, match="compute_budget"):
        selector.group(2, "mixtures", compute_budget=0.5)


def test_the_first_components_alone_predict_alike(estimator):
    same = estimator.truncated(10_000)
    mixtures = np.random.default_rng(0).uniform(size=(3, 6))
    assert np.allclose(same.predict(mixtures).loss, estimator.predict(mixtures).loss, atol=1e-7)
    goal = np.array([0.0, 1.0, 0.0, 2.0, 0.0, 0.0])
    for own, other in zip(
        same.sensitivity(goal).to_weights(mixtures[0]), estimator.sensitivity(goal).to_weights(mixtures[0])
    ):
        assert np.allclose(own, other, atol=1e-7)
    few = estimator.truncated(8)
    assert few.predict(mixtures).coefficients.shape == (3, 8)
    assert np.abs(few.predict(mixtures).loss - estimator.predict(mixtures).loss).max() < 0.1


def test_groups_may_go_on_where_the_adapter_for_all_tasks_has_ended(estimator):
    """By gradients at this adapter, which serves the tasks that are not worth a training."""
    start = estimator.parameters_at(estimator.predict(np.ones((1, 6))).coefficients[0])
    on = circle(start=start, recipe=TrainingRecipe([0.3] * 40, 12), length=0.5)
    selector = DataSelector(on)
    options = {"method": "mixtures", "group_initialization": "baseline"}
    grouping = selector.group(None, compute_budget=2.0, **options)
    after = on.predict_subsets(list(grouping.mixtures.values())).loss
    losses = [
        on.base_loss()[index] if grouping.group_of(task) == grouping.baseline_group else after[:, index].min()
        for index, task in enumerate(grouping.task_names)
    ]
    assert np.mean(losses) == pytest.approx(chosen_point(grouping)["predicted_loss"], abs=1e-6)
    every = predicted_losses(on, grouping)
    own = [every[list(grouping.groups).index(grouping.group_of(task)), i] for i, task in enumerate(grouping.task_names)]
    assert np.allclose(own, losses, atol=1e-6)
    assert np.mean(losses) < on.base_loss().mean() - 0.01 and grouping.cost <= 2.0
    assert on.training_cost(np.ones((1, 6)))[0] == 0.5
    assert selector.repeat(grouping) == grouping
    with pytest.raises(ConfigurationError, match="none is trained"):
        selector.group(None, has_baseline=False, **options)
    # Going on with all tasks is no second adapter for all: that one is where they begin.
    trained = {"group_0": ObservedRun(dict.fromkeys(on.task_names, 1.0), dict.fromkeys(on.task_names, 5.0))}
    kept = selector.group(None, compute_budget=1.5, trained=trained, **options)
    assert kept.group_of("task_0") != "group_0" and kept.cost == 1.5


def trained(estimator, mixture, loss):
    """An adapter that turned out to lose this on every task."""
    return ObservedRun(mixture, dict.fromkeys(estimator.task_names, loss))


def test_groups_that_are_trained_stay_and_serve_by_their_measured_losses(estimator):
    selector = DataSelector(estimator)
    half = dict.fromkeys(estimator.task_names[:3], 1.0)
    good, bad = trained(estimator, half, 0.1), trained(estimator, {"task_5": 1.0}, 3.0)
    found = selector.group(None, "mixtures", compute_budget=2.0, trained={"group_0": good, "group_1": bad})
    assert found.groups["group_0"] == list(estimator.task_names) and found.groups["group_1"] == []
    assert found.mixtures["group_0"] == half and found.cost == pytest.approx(1 + 3 / 6 + 1 / 6)
    assert found.baseline_group is None and list(found.groups) == ["group_0", "group_1"]
    again = selector.group(None, "mixtures", compute_budget=4.0, trained={"group_0": bad})
    assert list(again.groups)[:2] == ["group_0", "group_1"] and again.groups["group_0"] == []
    assert again.groups["group_1"] and again.mixtures["group_0"] == {"task_5": 1.0}
    assert again.cost <= 4.0 and selector.repeat(again) == again
    # No more adapters than were asked for.
    assert list(selector.group(1, "mixtures", has_baseline=False, trained={"group_0": bad}).groups) == ["group_0"]
    with pytest.raises(ConfigurationError, match="partitions the tasks anew"):
        selector.group(2, trained={"group_0": good})


def test_new_groups_take_no_name_of_one_that_is_trained(estimator):
    bad = {f"group_{place}": trained(estimator, {"task_5": 1.0}, 3.0) for place in (2, 1)}
    found = DataSelector(estimator).group(None, "mixtures", compute_budget=4.0, affinity_subsets=10, trained=bad)
    assert list(found.groups)[:3] == ["group_2", "group_1", "group_3"] and len(found.groups) == len(found.mixtures)
    assert found.mixtures["group_2"] == found.mixtures["group_1"] == {"task_5": 1.0}
    assert sorted(task for tasks in found.groups.values() for task in tasks) == sorted(estimator.task_names)


def test_the_first_group_gains_most_over_one_adapter_for_all(estimator):
    targets = dict(zip(estimator.task_names, [1.0, 1.0, 1.0, 1.0, 9.0, 9.0]))
    options = {"has_baseline": False, "affinity_subsets": 10, "targets": targets}
    found = DataSelector(estimator).group(3, "mixtures", **options)
    losses = estimator.predict_subsets([estimator.task_names, *found.mixtures.values()]).loss
    falls = dict(zip(estimator.task_names, (losses[0] - losses[1:]).T))
    gains = [sum(targets[task] * falls[task][row] for task in own) for row, own in enumerate(found.groups.values())]
    assert len(gains) == 3 and gains == sorted(gains, reverse=True)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (3, "Expected trained as a dict by name, found 3"),
        (
            {"group_0": {"mixture": {"task_0": 1.0}, "loss": {}}},
            r"trained\['group_0'\] as an ObservedRun, or a dict of",
        ),
        ({"group_0": ["task_0"]}, r"trained\['group_0'\] as an ObservedRun"),
        ({"group_0": {"mixture": {"task_9": 1.0}, "losses": {}}}, "Unknown tasks"),
    ],
)
def test_trained_groups_that_are_none_are_refused(estimator, bad, message):
    with pytest.raises(HfEnsembleError, match=message):
        DataSelector(estimator).group(None, "mixtures", affinity_subsets=10, trained=bad)


@pytest.mark.parametrize(
    ("names", "baseline", "expected", "together", "said"),
    [
        (
            "a",
            None,
            0.5,
            0.6,
            "1 adapter besides the one for all, at 1.50 times the training of one adapter for all, is ",
        ),
        ("a", 0, 0.5, 0.6, "1 adapter, at 1.50 times the training of one adapter for all, is expected to lower the "),
        ("ab", 1, 0.5, 0.6, "are expected to lower the mean loss from 0.6000 to 0.5000 "),
        ("ab", 1, 0.7, 0.6, "are expected to raise the mean loss from 0.6000 to 0.7000 "),
        ("ab", 1, 0.6, 0.6, "are expected to leave the mean loss at 0.6000 "),
    ],
)
def test_the_summary_says_which_way_the_loss_goes(names, baseline, expected, together, said):
    difference = expected - together
    point = CostPoint(0.5, len(names), expected, 0.0, difference, 0.0)
    at_hand = SimpleNamespace(has_baseline=True, cost=1.0)
    assert said in mixture_groups._summary(list(names), baseline, point, at_hand)


def test_the_curve_has_what_no_other_set_betters_and_each_set_once():
    points = [
        CostPoint(cost, 1, loss, 0.0, loss - 1.0, 0.0)
        for cost, loss in ((1.0, 0.5), (0.0, 1.0), (1.0, 0.6), (0.5, 1.1), (1.0, 0.5), (2.0, 0.4), (3.0, 0.45))
    ]
    # What is shown anyway may be there twice, too.
    front = mixture_groups._front(points, [points[0], points[-1]])
    assert [(one.cost, one.predicted_loss) for one in front] == [(0.0, 1.0), (1.0, 0.5), (2.0, 0.4), (3.0, 0.45)]


def test_of_targets_only_their_losses_count(estimator):
    selector = DataSelector(estimator)
    found = selector.group(None, "mixtures", targets={"task_0": 3.0, "task_3": 1.0}, compute_budget=3.0)
    losses = estimator.predict_subsets(list(found.mixtures.values())).loss
    assert (0.75 * losses[:, 0].min() + 0.25 * losses[:, 3].min()) == pytest.approx(
        chosen_point(found)["predicted_loss"], abs=1e-6
    )
    # As good as mixtures that were made for each of them.
    alone = [selector.mixture(task).predicted_loss for task in ("task_0", "task_3")]
    assert chosen_point(found)["predicted_loss"] < 0.75 * alone[0] + 0.25 * alone[1] + 0.01
    assert set(found.trained_on(found.group_of("task_0"))).isdisjoint({"task_3"})
    with pytest.raises(ConfigurationError, match="weigh the losses of mixtures"):
        selector.group(2, targets="task_0")


def test_the_adapter_for_all_is_compared_at_the_level_of_what_goes_on_from_it():
    names = [f"task_{index}" for index in range(6)]
    estimator = circle(start=np.zeros(40))
    predicted = estimator.predict(np.ones((1, 6))).loss[0]
    run = ObservedRun(dict.fromkeys(names, 1.0), dict(zip(names, 1.2 * predicted)), dict(zip(names, predicted)))
    leveled = circle(start=np.zeros(40), runs=[run])
    assert leveled.calibration.level == pytest.approx(np.full(6, 1.2))
    found = AdaptersAtHand.of(leveled, {}, has_baseline=True, starts_at_baseline=True)
    assert found.losses[-1] == pytest.approx(1.2 * leveled.base_loss(), rel=1e-6)
    assert found.on(leveled).losses == pytest.approx(found.losses, rel=1e-12)
    # Nothing but it is within the budget.
    options = {"compute_budget": 1.0, "group_initialization": "baseline", "affinity_subsets": 10}
    grouping = DataSelector(leveled).group(2, "mixtures", **options)
    assert list(grouping.groups) == [grouping.baseline_group]
    assert predicted_losses(leveled, grouping)[0] == pytest.approx(1.2 * leveled.base_loss(), rel=1e-6)
