"""Mixtures are chosen by losses with a scale of each task's outputs, as the weights that serve them have one."""

from dataclasses import replace

import numpy as np
import pytest

from hf_ensemble import TrainingRecipe
from hf_ensemble.estimate import ObservedRun, SubsetEstimator
from hf_ensemble.runs.records import Estimate
from hf_ensemble.select import DataSelector, Grouping, partition_loss, predicted_losses
from hf_ensemble.store import FeatureTable

NAMES = ("a", "b", "c", "d")
OPTIONS = {"method": "mixtures", "group_initialization": "baseline", "affinity_subsets": 5, "compute_budget": 2.0}


def tables(right=0.75, entropy=0.0):
    """Tasks that learn one thing each, which is true of a share of the validation rows."""

    def table(count, share):
        task = np.repeat(np.arange(4), count)
        signs = np.tile(np.where(np.arange(count) < share * count, 1.0, -1.0), 4)
        features = 3 * signs[:, None] * np.eye(4)[task]
        ids = np.arange(4 * count).astype(str)
        zeros = np.zeros(4 * count, dtype=np.float32)
        return FeatureTable(features.astype(np.float32), zeros, task, NAMES, ids, other_entropy=zeros + entropy)

    return table(20, 1.0), table(80, right)


def made(with_entropy=True, right=0.75, **options):
    arrays = tables(right)
    if not with_entropy:
        arrays = [replace(table, other_entropy=None) for table in arrays]
    recipe = TrainingRecipe([0.05] * 40, 8, 300.0)
    return DataSelector(SubsetEstimator(*arrays, recipe=recipe)).group(None, **{**OPTIONS, **options})


def test_an_adapter_that_is_right_and_too_sure_of_itself_is_worth_its_cost():
    estimator = SubsetEstimator(*tables(), recipe=TrainingRecipe([0.05] * 40, 8, 300.0))
    base, trained = estimator.base_loss(), estimator.predict(np.eye(4)).loss.diagonal()
    scaled = estimator.scaled().predict(np.eye(4)).loss.diagonal()
    # Three of four answers are right afterwards, where they were open before; the fourth costs more than they gain.
    assert (trained > base).all() and (scaled < base - 0.05).all()
    grouping = made()
    assert " Losses are those with a scale of each task's outputs. " in grouping.summary
    assert grouping.baseline_group is None and sorted(map(len, grouping.groups.values())) != [4]
    (taken,) = {one["predicted_loss"] for one in grouping.cost_curve if one["expected_loss"] == grouping.expected_loss}
    assert taken == pytest.approx(scaled.mean(), abs=0.02)
    # What a group's adapter loses by itself is told as it is.
    losses = predicted_losses(estimator, grouping)
    own = [losses[list(grouping.groups).index(grouping.group_of(task)), NAMES.index(task)] for task in NAMES]
    assert own == pytest.approx(trained, rel=0.2)
    assert grouping.baselines["one per task"] == pytest.approx(scaled.mean(), abs=1e-3)


@pytest.mark.parametrize("changes", [{"with_entropy": False}, {"output_scales": False}])
def test_without_a_scale_it_is_not(changes):
    grouping = made(**changes)
    assert list(grouping.groups) == [grouping.baseline_group] and "is enough" in grouping.summary
    assert grouping.settings["output_scales"] == changes.get("output_scales", True)
    assert "scale" not in grouping.summary


@pytest.mark.parametrize("output_scales", [True, False])
def test_records_of_a_run_predict_the_losses_that_its_ensemble_will_have(output_scales):
    estimator = SubsetEstimator(*tables(), recipe=TrainingRecipe([0.05] * 40, 8, 300.0))
    grouping = DataSelector(estimator).group(None, **OPTIONS, output_scales=output_scales)
    served = estimator.scaled() if output_scales else estimator
    losses = predicted_losses(served, grouping)
    for row, found in zip(losses, Estimate.of(estimator, grouping).predicted_loss.values()):
        assert list(found.values()) == pytest.approx(row.tolist())


def test_other_methods_choose_by_losses_without_one():
    estimator = SubsetEstimator(*tables(), recipe=TrainingRecipe([0.05] * 40, 8, 300.0))
    grouping = DataSelector(estimator).group(2, has_baseline=False, affinity_subsets=5)
    assert grouping.predicted_loss["2"] == pytest.approx(partition_loss(estimator, grouping.groups.values()))


def test_what_is_wrong_is_not_chosen_for_its_scale():
    grouping = made(right=0.5)
    assert list(grouping.groups) == [grouping.baseline_group]


def test_a_choice_is_repeated_and_losses_that_were_measured_are_taken_with_a_scale(tmp_path):
    estimator = SubsetEstimator(*tables(), recipe=TrainingRecipe([0.05] * 40, 8, 300.0))
    selector = DataSelector(estimator)
    grouping = selector.group(None, **OPTIONS)
    grouping.save(tmp_path / "grouping.json")
    assert selector.repeat(Grouping.load(tmp_path / "grouping.json")) == grouping
    # Nine tenths of what was predicted without a scale are nine tenths of what is predicted with one.
    predicted = estimator.predict(np.eye(4)[:1]).loss[0] * [0.9, 1, 1, 1]
    scaled = estimator.scaled().predict(np.eye(4)[:1]).loss[0]
    run = ObservedRun({"a": 1.0}, dict(zip(NAMES, predicted.tolist())))
    again = selector.group(None, trained={"group_0": run}, **OPTIONS)
    assert again.groups["group_0"] == ["a"]
    alone = [point for point in again.cost_curve if point["num_groups"] == 0]
    base = estimator.scaled().base_loss()
    assert alone[0]["predicted_loss"] == pytest.approx((0.9 * scaled[0] + base[1:].sum()) / 4, abs=1e-3)
