import json
from dataclasses import replace

import numpy as np
import pytest

from hf_ensemble.errors import StoreError, StoreMismatchError
from hf_ensemble.store import CapturedRows, GradientStore, GradientStoreWriter

PLAN = [("train" if i < 7 else "validation", "ab"[i % 2], f"id{i}") for i in range(10)]


def rows(positions, seed=0):
    rng = np.random.default_rng(seed)
    every = rng.normal(size=(10, 6)).astype(np.float32) * np.logspace(-6, 6, 10, dtype=np.float32)[:, None]
    every[4] = 0
    index = list(positions)
    return CapturedRows(every[index], np.arange(10.0)[index], np.arange(10.0)[index], np.ones(10)[index])


def writer(folder, **changes):
    settings = {"identity": {"model": {"name": "m"}, "config": {"seed": 0}}, "plan": PLAN, "dim": 6, "shard_size": 4}
    return GradientStoreWriter(folder, **{**settings, **changes})


def fill(folder, **changes):
    own = writer(folder, **changes)
    for shard in own.missing_shards():
        own.write_shard(shard, rows(own.rows_of(shard)))
    own.finish(versions={"torch": "2"})
    return folder


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 4e-3), ("float32", 1e-6)])
def test_features_survive_whatever_their_scale(tmp_path, dtype, tolerance):
    store = GradientStore(fill(tmp_path / "s", dtype=dtype))
    table = store.table("train")
    expected = rows(range(7)).features
    largest = np.abs(expected).max(axis=1, keepdims=True) + 1e-30
    assert (np.abs(table.features - expected) <= tolerance * largest).all()
    assert table.task.tolist() == [0, 1, 0, 1, 0, 1, 0] and table.example_id[3] == "id3"
    assert store.table("validation", ["b"]).example_id.tolist() == ["id7", "id9"]
    with pytest.raises(StoreError, match=r"no 'test' rows of the tasks \['a', 'b'\]"):
        store.table("test")


def test_the_entropy_of_other_answers_is_not_known_of_all_rows(tmp_path):
    entropies = np.linspace(0.1, 1.0, 10)
    for name, known in (("all", entropies), ("some", np.where(np.arange(10) == 8, np.nan, entropies))):
        own = writer(tmp_path / name)
        for shard in own.missing_shards():
            positions = own.rows_of(shard)
            own.write_shard(shard, replace(rows(positions), other_entropy=known[list(positions)]))
        own.finish()
    store = GradientStore(tmp_path / "all")
    assert store.table("validation", ["b"]).other_entropy == pytest.approx(entropies[[7, 9]])
    whole, part = store.table("validation"), GradientStore(tmp_path / "some").table("validation")
    assert whole.other_entropy == pytest.approx(entropies[7:]) and part.fingerprint() != whole.fingerprint()
    assert part.other_entropy == pytest.approx(np.where(np.arange(7, 10) == 8, np.nan, entropies[7:]), nan_ok=True)
    assert GradientStore(tmp_path / "some").table("train").other_entropy == pytest.approx(entropies[:7])
    some = whole.of_rows(np.array([2, 0]))
    assert some.other_entropy == pytest.approx(entropies[[9, 7]]) and (some.features == whole.features[[2, 0]]).all()
    # What is excluded is in no table, whatever it holds.
    own, bad = writer(tmp_path / "excluded"), rows(range(10))
    bad.features[7] = np.nan
    for shard in own.missing_shards():
        positions = list(own.rows_of(shard))
        part = replace(bad, features=bad.features[positions], margin=bad.margin[positions], loss=bad.loss[positions])
        part = replace(part, num_tokens=bad.num_tokens[positions], other_entropy=entropies[positions])
        own.write_shard(shard, part, exclude_non_finite=True)
    own.finish()
    assert GradientStore(tmp_path / "excluded").table("validation").other_entropy == pytest.approx(entropies[8:])
    assert GradientStore(fill(tmp_path / "none")).table("train").other_entropy is None


def test_examples_are_read_by_task_and_id(tmp_path):
    store = GradientStore(fill(tmp_path / "s"))
    some = store.table("train", {"b": ["id5", "id1"], "a": ["id2"]})
    assert some.example_id.tolist() == ["id1", "id2", "id5"] and some.task_names == ("b", "a")
    whole = store.table("train")
    assert (some.features[:] == whole.features[[1, 2, 5]]).all() and (some.margin == whole.margin[[1, 2, 5]]).all()
    for wanted, named in [({"a": ["id1"]}, "a/id1"), ({"a": ["id8"]}, "a/id8")]:
        with pytest.raises(StoreError, match=f"1 of the requested examples, for example '{named}'"):
            store.table("train", wanted)
    with pytest.raises(StoreError, match=r"Unknown tasks \['c'\]"):
        store.table("train", {"c": ["id1"]})


def test_a_writer_killed_over_its_first_file_is_no_obstacle(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / ".manifest.json.abc.tmp").write_bytes(b"half")
    assert len(GradientStore(fill(folder))) == 10 and not list(folder.glob(".*"))
    (folder / "notes.txt").write_text("kept")
    (folder / "manifest.json").unlink()
    with pytest.raises(StoreError, match="not empty and has no manifest"):
        fill(folder)


def test_unfinished_store_is_no_store(tmp_path):
    own = writer(tmp_path / "s")
    own.write_shard(1, rows(own.rows_of(1)))
    with pytest.raises(StoreError, match=r"lacks the shards \[0, 2\]"):
        own.finish()
    with pytest.raises(StoreError, match="unfinished"):
        GradientStore(tmp_path / "s")
    with pytest.raises(StoreError, match="Expected a gradient store"):
        GradientStore(tmp_path / "t")


@pytest.mark.parametrize("name", ["shard-00001.features.npy", "shard-00002.rows.arrow"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_and_named(tmp_path, name, damage):
    path = fill(tmp_path / "s") / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-3])
    else:
        path.unlink()
    with pytest.raises(StoreError, match=name):
        GradientStore(tmp_path / "s")


def test_missing_marker_and_newer_format_are_named(tmp_path):
    folder = fill(tmp_path / "s")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(StoreError, match="format version 99"):
        GradientStore(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "shard-00000.json").unlink()
    with pytest.raises(StoreError, match="shard-00000.json is missing"):
        GradientStore(folder)


def test_other_identity_is_refused_or_overwritten(tmp_path):
    folder = fill(tmp_path / "s")
    other = {"identity": {"model": {"name": "m"}, "config": {"seed": 1}}}
    with pytest.raises(StoreMismatchError, match="identity.config.seed: found 0, expected 1"):
        writer(folder, **other)
    assert writer(folder, **other, overwrite=True).missing_shards() == [0, 1, 2]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="not empty"):
        writer(tmp_path / "t")


def test_bad_rows_are_named(tmp_path):
    own = writer(tmp_path / "s")
    with pytest.raises(StoreError, match=r"Expected features of shape \(4, 6\) for shard 0, found \(2, 6\)"):
        own.write_shard(0, rows(range(2)))
    bad = rows(own.rows_of(0))
    bad.features[2, 3] = np.inf
    bad.margin[3] = np.nan
    with pytest.raises(StoreError, match="2 examples have gradients that are not finite: a/id2, b/id3"):
        own.write_shard(0, bad)
    assert own.missing_shards() == [0, 1, 2]
