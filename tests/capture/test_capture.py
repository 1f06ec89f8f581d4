"""The capture pass and its store."""

import numpy as np
import pytest
import torch

from helpers import toy
from helpers.captures import capture, contents, relative_error
from hf_ensemble.capture import CaptureConfig, GradientExtractor, Preconditioner
from hf_ensemble.errors import CaptureError, ConfigurationError, StoreError, StoreMismatchError
from hf_ensemble.store import GradientStore
from hf_ensemble.tasks import TaskSet, data_collator_for, encode


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("hf_ensemble.capture.capture.SHARD_SIZE", 20)


@pytest.fixture
def whole_store(tmp_path):
    return tmp_path / "whole", capture(tmp_path / "whole")


def test_store_explains_itself(whole_store):
    _, store = whole_store
    assert store.task_names == ("sums", "diffs", "more_sums")
    assert len(store) == 3 * 30 and store.dim == 64
    identity = store.identity
    assert identity["config"]["margin"] == "geometric_mean" and identity["model"]["adapter"]["default"]["r"] == 4
    assert store.manifest["status"] == "complete" and store.manifest["versions"]["torch"]
    assert store.manifest["coverage"]["fallback"] == [] and len(store.manifest["coverage"]["hooked"]) == 28


def test_store_rows_equal_the_extractor(whole_store):
    _, store = whole_store
    model, tokenizer = toy.with_lora(toy.llama()), toy.tokenizer()
    tasks = TaskSet.from_datasets(toy.sft_tasks(train=24, validation=6))
    rows = list(encode(tasks.table("validation"), tokenizer, tasks.row_format))
    collator = data_collator_for(tasks.row_format, tokenizer, labels_are_tokens=True)
    extractor = GradientExtractor(model, 64)
    extractor.preconditioner = Preconditioner(store.preconditioner())
    expected = extractor(collator(rows))
    table = store.table("validation")
    assert table.example_id.tolist() == [row["example_id"] for row in rows]
    assert relative_error(torch.from_numpy(table.features[:]), expected.features) < 1e-5
    assert relative_error(torch.from_numpy(table.margin.copy()), expected.margin) < 1e-5
    assert table.other_entropy is None and expected.other_entropy.isnan().all() and expected.num_tokens.min() > 1
    some = store.table("validation", ["more_sums", "sums"])
    assert some.task_names == ("more_sums", "sums") and (some.features[some.task == 1] == table.features[:6]).all()


def test_a_store_has_the_entropies_of_other_answers(tmp_path):
    labels = ("no", "perhaps", "yes")
    rows = {"songs": {"train": toy.text_rows(24, 5, "song", labels), "validation": toy.text_rows(6, 6, "song", labels)}}
    tasks, tokenizer = TaskSet.from_datasets(rows), toy.tokenizer()
    model = toy.with_lora(toy.bert(3))
    store = capture(tmp_path / "store", model, rows)
    collator = data_collator_for(tasks.row_format, tokenizer, labels_are_tokens=False)
    extractor = GradientExtractor(model, 64, label_space=tasks.label_space)
    for split in ("train", "validation"):
        encoded = list(encode(tasks.table(split), tokenizer, tasks.row_format, tasks.label_space))
        expected = extractor(collator(encoded)).other_entropy
        found = torch.from_numpy(store.table(split).other_entropy.copy())
        assert torch.allclose(found, expected, atol=1e-5) and 0 < found.min() < found.max() < np.log(2) + 1e-6


@pytest.mark.parametrize("kill_after", [0, 1, 3])
def test_a_killed_capture_goes_on_and_ends_with_the_same_store(tmp_path, monkeypatch, whole_store, kill_after):
    from hf_ensemble.store import GradientStoreWriter

    folder = tmp_path / "store"
    write, written = GradientStoreWriter.write_shard, []

    def killed(self, shard, rows, **kwargs):
        if len(written) == kill_after:
            # What a process leaves that dies between the features and the marker of a shard.
            (self.folder / f"shard-{shard:05d}.features.npy").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(shard)
        write(self, shard, rows, **kwargs)

    monkeypatch.setattr(GradientStoreWriter, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        capture(folder)
    with pytest.raises(StoreError, match="unfinished"):
        GradientStore(folder)
    redone = []

    def counted(self, shard, rows, **kwargs):
        redone.append(shard)
        write(self, shard, rows, **kwargs)

    monkeypatch.setattr(GradientStoreWriter, "write_shard", counted)
    capture(folder)
    assert not set(redone) & set(written)
    assert contents(folder) == contents(whole_store[0])


def test_a_capture_killed_before_its_last_word_is_completed(tmp_path, monkeypatch):
    from hf_ensemble.store import GradientStoreWriter

    with monkeypatch.context() as patch:
        patch.setattr(GradientStoreWriter, "finish", lambda self, *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            capture(tmp_path / "store")
    monkeypatch.setattr(GradientStoreWriter, "write_shard", lambda *a, **k: pytest.fail("captured again"))
    assert len(capture(tmp_path / "store")) == 90


def test_fingerprint_of_a_tensor_with_more_entries_than_float32_counts():
    from hf_ensemble.capture.identity import _hash

    large = torch.zeros(2**24 + 2**20 + 3, dtype=torch.int8)
    first = _hash({"w": large}, 64)
    large[-1] = 1
    assert _hash({"w": large}, 64) != first


def test_a_store_of_something_else_is_refused_by_name(tmp_path):
    rows = toy.sft_tasks()
    folder = tmp_path / "store"
    first = capture(folder, rows=rows)
    again = capture(folder, rows=rows)
    assert (again.table("train").features[:] == first.table("train").features).all()
    other = toy.sft_tasks()
    other["sums"]["train"][0]["completion"] = " 19"
    changed_base = toy.with_lora(toy.llama(seed=1))
    for arguments, name in [
        ({"rows": other}, "data.fingerprint"),
        ({"rows": rows, "projection_seed": 1}, "config.projection_seed"),
        ({"rows": rows, "margin": "mean_log_odds"}, "config.margin"),
        ({"rows": rows, "projection_dim": 32}, "dim: found 64, expected 32"),
        ({"rows": rows, "model": toy.with_lora(toy.llama(), seed=1)}, "model.theta0"),
        ({"rows": rows, "model": changed_base}, "model.base_weights"),
        ({"rows": rows, "model": toy.with_lora(toy.llama(), lora_alpha=16)}, "model.adapter.default.lora_alpha"),
    ]:
        with pytest.raises(StoreMismatchError, match=name):
            capture(folder, **arguments)
    assert len(GradientStore(folder)) == len(first)


def test_gradients_that_are_not_finite_are_named(tmp_path):
    model = toy.with_lora(toy.llama())
    rows = toy.sft_tasks(train=4, validation=2)
    # The word "diff" alone makes the model overflow.
    with torch.no_grad():
        model.get_input_embeddings().weight[toy.VOCABULARY.index("diff")] = float("nan")
    with pytest.raises(StoreError, match=r"6 examples have gradients that are not finite: diffs/"):
        capture(tmp_path / "store", model, rows)


def test_a_model_without_adapter_and_rows_without_answer_are_named(tmp_path):
    model = toy.llama()
    model.requires_grad_(False)
    with pytest.raises(CaptureError, match="Expected a trainable parameter, found none"):
        capture(tmp_path / "store", model, toy.sft_tasks())
    extractor = GradientExtractor(toy.with_lora(toy.llama()), 64)
    ids = torch.randint(3, 20, (2, 4))
    with pytest.raises(CaptureError, match="no answer token"):
        extractor({"input_ids": ids, "labels": torch.full((2, 4), -100)})


def test_config_is_checked():
    for settings, message in [
        ({"projection_dim": 0}, "projection_dim"),
        ({"batch_size": 0}, "batch_size"),
        ({"margin": "mean"}, "margin"),
        ({"max_batch_tokens": 0}, "max_batch_tokens"),
        ({"non_finite": "ignore"}, "non_finite"),
        ({"feature_dtype": "float64"}, "bfloat16"),
        ({"preconditioner": "sgd"}, "optimizer"),
        ({"mixed_precision": "fp16"}, "mixed_precision has to be one of"),
        ({"max_length": 0}, "max_length"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            CaptureConfig(**settings)


def test_capture_leaves_model_and_random_state_alone(tmp_path):
    model = toy.with_lora(toy.llama(), lora_dropout=0.3).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    capture(tmp_path / "store", model, toy.sft_tasks())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
