"""Parts of a dataset that are chosen or left out."""

from dataclasses import replace

import numpy as np
import pytest

from helpers import toy
from helpers.captures import capture
from hf_ensemble import DataSelector, FeatureTable, ObservedRun, SubsetEstimator, TaskSet
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.select.clusters import cluster_counts, split_into_clusters


def half_wrong(seed=0, dim=30):
    """Task b has 30 rows that want what a wants, and 20 that want the opposite."""
    rng = np.random.default_rng(seed)
    move = rng.normal(size=dim)

    def table(signs, names=("a", "b")):
        task, sign = (np.array(values) for values in zip(*signs))
        features = sign[:, None] * move + 0.4 * rng.normal(size=(len(task), dim))
        ids = np.array([f"{'right' if value > 0 else 'wrong'}-{index}" for index, value in enumerate(sign)])
        return FeatureTable(features.astype(np.float32), np.zeros(len(task), np.float32), task, names, ids, task + 2)

    train = table([(0, 1)] * 10 + [(1, 1), (1, 1), (1, -1), (1, 1), (1, -1)] * 10)
    return train, table([(0, 1)] * 20 + [(1, 1)] * 12 + [(1, -1)] * 8)


def test_parts_take_the_place_of_the_whole():
    train, validation = half_wrong()
    parts, held_out = split_into_clusters(train, validation, {"b": 2})
    assert parts.task_names == held_out.task_names == ("a", "b/0", "b/1")
    assert np.bincount(parts.task).tolist() == [10, 30, 20] and np.bincount(held_out.task).tolist() == [20, 20, 20]
    for index, kind in ((1, "right"), (2, "wrong")):
        assert all(name.startswith(kind) for name in parts.example_id[parts.task == index])
        rows = held_out.task == index
        assert (held_out.features[rows] == validation.features[validation.task == 1]).all()
        assert (held_out.num_tokens[rows] == 3).all()
    assert (parts.features == train.features).all()
    assert cluster_counts(parts.task_names) == {"b": 2}
    assert split_into_clusters(train, validation, {"b": 1})[0].task_names == ("a", "b/0")


def test_every_column_of_a_row_goes_with_it():
    train, validation = half_wrong()
    order = np.random.default_rng(1).permutation(len(validation))
    entropies = np.where(validation.example_id.astype("U5") == "right", 0.25, 0.75).astype(np.float32)
    validation = replace(validation, other_entropy=entropies).of_rows(order)
    for clusters in ({"b": 2}, {"a": 1, "b": 1}):
        parts, held_out = split_into_clusters(train, validation, clusters)
        is_right = held_out.example_id.astype("U5") == "right"
        assert (held_out.other_entropy == np.where(is_right, 0.25, 0.75)).all()
        assert SubsetEstimator(parts, held_out).scaled().base_loss().shape == (len(parts.task_names),)


def test_dividing_changes_no_prediction_of_the_whole():
    train, validation = half_wrong()
    run = ObservedRun({"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 0.6})
    whole = SubsetEstimator(train, validation, observed_runs=[run])
    parts = split_into_clusters(train, validation, {"b": 2})
    names = parts[0].task_names
    estimator = SubsetEstimator(*parts, observed_runs=[ObservedRun(dict.fromkeys(names, 1.0), {"a": 0.5, "b/0": 0.6})])
    assert estimator.regularization.l2_scale == pytest.approx(whole.regularization.l2_scale, rel=1e-3)
    estimator.regularization = whole.regularization
    # Of the surrogate: what tasks have in common is another matter where a task counts twice.
    estimator.calibration = whole.calibration = None
    found, expected = estimator.predict_subsets([names]).loss[0], whole.predict_subsets([["a", "b"]]).loss[0]
    assert found == pytest.approx([expected[0], expected[1], expected[1]], rel=1e-4)


def test_the_wrong_part_is_left_out_with_a_reason():
    parts = split_into_clusters(*half_wrong(), {"b": 2})
    run = ObservedRun(dict.fromkeys(parts[0].task_names, 1.0), {"a": 0.6})
    selector = DataSelector(SubsetEstimator(*parts, observed_runs=[run]))
    selection = selector.select("a")
    assert selection.tasks == ["a", "b/0"]
    left_out = selector.left_out(selection)
    assert list(left_out) == ["b"] and len(left_out["b"]) == 20
    assert all(name.startswith("wrong") for name in left_out["b"])
    assert "b/1, a cluster of 20 rows, is not predicted to lower the loss of a" in set(left_out["b"].values())
    # Of a task that is not taken at all, no row is named.
    assert selector.left_out(selector.select("a", max_auxiliary=0)) == {}


def test_a_store_is_divided_and_its_tasks_filtered(tmp_path):
    store = capture(tmp_path / "store")
    run = ObservedRun({"sums": 1.0, "diffs": 1.0}, {"sums": 2.0, "diffs": 2.5})
    selector = DataSelector.from_store(store, None, 20, [run], {"diffs": 2.0}, {"diffs": 3})
    estimator = selector.estimator
    assert set(estimator.task_names) == {"sums", "diffs/0", "diffs/1", "diffs/2", "more_sums"} & set(
        estimator.task_names
    ) | {"diffs/0", "diffs/1", "diffs/2"}
    assert dict(zip(estimator.task_names, estimator.sampling_weights))["diffs/2"] == 2.0
    selection = selector.select("sums", include=["sums", "diffs/0"], exclude=["diffs/1"])
    filtered = TaskSet.from_datasets(toy.sft_tasks(train=24, validation=6)).without(selector.left_out(selection))
    kept = set(filtered["diffs"].splits["train"]["example_id"])
    assert kept == {
        example for part, example in estimator.training_ids if part in selection.tasks and part.startswith("diffs/")
    }
    selection.save(tmp_path / "selection.json")
    again = DataSelector.for_choice(store, type(selection).load(tmp_path / "selection.json"))
    assert again.repeat(selection) == selection


@pytest.mark.filterwarnings("error")
def test_equal_rows_are_no_clusters_of_their_own():
    train, validation = half_wrong()
    features = train.features.copy()
    kinds = np.array([name.startswith("right") for name in train.example_id])
    for kind in (True, False):
        features[kinds == kind] = features[kinds == kind][0]
    parts, _ = split_into_clusters(replace(train, features=features), validation, {"b": 4})
    assert parts.task_names == ("a", "b/0", "b/1") and np.bincount(parts.task).tolist() == [10, 30, 20]


@pytest.mark.parametrize(
    ("clusters", "message"), [({"x": 2}, "Unknown tasks to cluster"), ({"a": 11}, "1 to 10 clusters, found 11")]
)
def test_what_cannot_be_divided_is_named(clusters, message):
    with pytest.raises(ConfigurationError, match=message):
        split_into_clusters(*half_wrong(), clusters)
