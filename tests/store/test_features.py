"""Features stay on disk: whoever reads them takes blocks."""

import tracemalloc

import numpy as np
import pytest

from hf_ensemble.estimate import FeatureReduction, SubsetEstimator
from hf_ensemble.select import DataSelector
from hf_ensemble.store import CapturedRows, GradientStore, GradientStoreWriter, features


def store(folder, rows, dim, shard_size=64, dtype="float16", tasks=4):
    """A store of random rows whose tasks have their own mean, a quarter of them for validation."""
    plan = [("validation" if i % 4 == 0 else "train", f"task{i // 4 % tasks}", f"id{i}") for i in range(rows)]
    writer = GradientStoreWriter(
        folder, identity={"model": {}, "config": {}}, plan=plan, dim=dim, shard_size=shard_size, dtype=dtype
    )
    rng = np.random.default_rng(0)
    means = rng.normal(size=(tasks, dim)).astype(np.float32) * 0.2
    for shard in writer.missing_shards():
        own = np.array(writer.rows_of(shard))
        part = rng.normal(size=(len(own), dim)).astype(np.float32) + means[own // 4 % tasks]
        margin = rng.normal(size=len(own))
        writer.write_shard(shard, CapturedRows(part, margin, np.logaddexp(0, -margin), np.ones(len(own))))
    writer.finish(versions={})
    return GradientStore(folder, verify=False)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rows_and_columns_are_read_as_from_an_array(tmp_path, dtype):
    found = store(tmp_path / "s", 40, 6, shard_size=7, dtype=dtype).table("train").features
    whole = np.asarray(found)
    assert found.shape == whole.shape == (30, 6) and found.dtype == whole.dtype == np.float32 and len(found) == 30
    rng = np.random.default_rng(1)
    for rows in (3, slice(2, 20), slice(None), [5, 1, 1], np.arange(30) % 3 == 0, slice(4, 4)):
        assert (found[rows] == whole[rows]).all() and found[rows].shape == whole[rows].shape
        for columns in (slice(None), slice(2, 5), slice(4, 100)):
            assert (found[rows, columns] == whole[rows, columns]).all()
    index = rng.permutation(30)[:11]
    assert (found.take(index)[2:5] == whole[index][2:5]).all()
    for block in (1, 13, 10_000):
        assert (np.concatenate([rows for _, rows in features.row_blocks(found, block)]) == whole).all()
        assert (np.concatenate(list(features.column_blocks(found, block)), axis=1) == whole).all()


@pytest.mark.parametrize(("rows", "dim"), [(40, 90), (400, 9)])
def test_blocks_change_nothing(tmp_path, monkeypatch, rows, dim):
    """As for the same features in memory, whatever the size of the blocks."""
    own = store(tmp_path / "s", rows, dim, shard_size=17)
    tables = [own.table(split) for split in ("train", "validation")]
    in_memory = [type(table)(**{**vars(table), "features": table.features[:]}) for table in tables]
    expected = SubsetEstimator(*in_memory)
    monkeypatch.setattr(features, "BLOCK", 5 * dim + 1)
    found = SubsetEstimator(*tables)
    assert found.provenance()["features"] == expected.provenance()["features"]
    subsets = [["task0"], ["task1", "task3"]]
    assert np.allclose(found.predict_subsets(subsets).loss, expected.predict_subsets(subsets).loss, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "dim", "components", "share"),
    [
        # Many features of few rows, and many rows.
        (256, 80_000, 2, 8),
        (20_000, 1024, 4, 3),
    ],
)
def test_an_estimate_takes_a_fraction_of_the_features_memory(tmp_path, monkeypatch, rows, dim, components, share):
    own = store(tmp_path / "s", rows, dim, shard_size=max(1, 2_000_000 // dim))
    monkeypatch.setattr(features, "BLOCK", 50_000)
    tracemalloc.start()
    try:
        DataSelector.from_store(own, num_components=components).select("task0", max_auxiliary=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * rows * dim / share


def test_the_reduction_is_the_same_for_every_block(monkeypatch):
    x = np.random.default_rng(0).normal(size=(30, 12)).astype(np.float32)
    for array in (x, x.T.copy()):
        expected = FeatureReduction.fit(array, 5)
        monkeypatch.setattr(features, "BLOCK", 40)
        found = FeatureReduction.fit(array, 5)
        monkeypatch.undo()
        assert found.scale == pytest.approx(expected.scale)
        assert np.allclose(found.components @ found.components.T, expected.components @ expected.components.T)
        assert np.allclose(
            found.apply(array) @ found.components.T, expected.apply(array) @ expected.components.T, atol=1e-6
        )


def test_directions_of_some_rows_are_those_of_all():
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(6000, 20)) * np.geomspace(1, 1e-3, 20)).astype(np.float32)
    every, some = (FeatureReduction.fit(features, 4, most_rows=most) for most in (None, 2000))
    assert some.scale == pytest.approx(every.scale, rel=0.05)
    assert np.linalg.svd(every.components.T @ some.components)[1].min() > 0.99
    # Few rows a feature are all of use.
    few = FeatureReduction.fit(features[:150], 4, most_rows=10)
    assert np.array_equal(few.components, FeatureReduction.fit(features[:150], 4).components)
