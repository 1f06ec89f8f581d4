"""Several stores by one pass, and the optimizer's own second moments."""

import numpy as np
import pytest
import torch

from helpers import toy
from helpers.captures import capture
from hf_ensemble import CaptureConfig, GradientCaptureCallback, TaskSet, capture_gradients
from hf_ensemble.errors import CaptureError, ConfigurationError
from hf_ensemble.store import GradientStore, GradientStoreWriter

CONFIGS = {
    "small": CaptureConfig(projection_dim=32, feature_dtype="float32"),
    "other-seed": CaptureConfig(projection_dim=64, projection_seed=3, feature_dtype="bfloat16"),
    "exact": CaptureConfig(projection_dim=None, feature_dtype="float32"),
}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("hf_ensemble.capture.capture.SHARD_SIZE", 20)


def run(folder, configs=CONFIGS, **arguments):
    tasks = TaskSet.from_datasets(toy.sft_tasks(train=20, validation=6))
    model = arguments.pop("model", None) or toy.with_lora(toy.llama())
    options = {"processing_class": toy.tokenizer(), "disable_tqdm": True, **arguments}
    return capture_gradients(model, tasks, configs, folder, **options)


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


def test_one_pass_fills_the_stores_that_separate_passes_would(tmp_path, monkeypatch):
    from hf_ensemble.capture.gradients import GradientExtractor

    batches = []
    call = GradientExtractor.__call__
    monkeypatch.setattr(GradientExtractor, "__call__", lambda self, batch: batches.append(1) or call(self, batch))
    stores = run(tmp_path / "together")
    together = len(batches)
    assert list(stores) == list(CONFIGS) and [store.dim for store in stores.values()][:2] == [32, 64]
    for name, config in CONFIGS.items():
        alone = run(tmp_path / name, config)
        assert isinstance(alone, GradientStore) and shards(alone.folder) == shards(tmp_path / "together" / name)
        assert alone.identity == stores[name].identity
    assert len(batches) == 4 * together


def test_a_killed_pass_goes_on_in_every_store(tmp_path, monkeypatch):
    run(tmp_path / "whole")
    write, written = GradientStoreWriter.write_shard, []

    def killed(self, *args, **kwargs):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(1)
        write(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GradientStoreWriter, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed")
    # One store has two shards, the others one; one store has lost its preconditioner.
    (tmp_path / "killed" / "exact" / "preconditioner.safetensors").unlink()
    written.clear()
    monkeypatch.setattr(
        GradientStoreWriter, "write_shard", lambda *args, **kwargs: written.append(1) or write(*args, **kwargs)
    )
    run(tmp_path / "killed")
    assert len(written) == sum(len(list((tmp_path / "whole" / name).glob("*.npy"))) for name in CONFIGS) - 4
    for name in CONFIGS:
        assert shards(tmp_path / "killed" / name) == shards(tmp_path / "whole" / name)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ({}, "at least one"),
        ({"a/b": CaptureConfig()}, "plain folder names"),
        ({"": CaptureConfig()}, "plain folder names"),
        ({"a": CaptureConfig(), "b": CaptureConfig(margin="mean_log_odds")}, r"differ in \['margin'\]"),
    ],
)
def test_settings_that_one_pass_cannot_serve_are_refused(tmp_path, configs, message):
    with pytest.raises(ConfigurationError, match=message):
        run(tmp_path, configs)
    assert not list(tmp_path.iterdir())


def test_the_optimizers_second_moments_make_the_preconditioner(tmp_path):
    model = toy.with_lora(toy.llama())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.5))
    ids = torch.randint(3, 20, (4, 8))
    config = CaptureConfig(projection_dim=64, preconditioner="optimizer")
    with pytest.raises(CaptureError, match=r"no second moments of .*found nothing.* preconditioner='adam'"):
        run(tmp_path / "early", config, model=model, optimizer=optimizer)
    with pytest.raises(CaptureError, match="Pass it as optimizer="):
        run(tmp_path / "without", config, model=model)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    store = run(tmp_path / "store", config, model=model, optimizer=optimizer)
    scales = store.preconditioner()
    moments = {n: optimizer.state[p]["exp_avg_sq"] for n, p in model.named_parameters() if p.requires_grad}
    mean = torch.cat([moment.flatten() for moment in moments.values()])
    mean = mean.sum() / mean.count_nonzero()
    for name, moment in moments.items():
        assert np.allclose(scales[name], (moment / mean + 1e-3) ** -0.25, rtol=1e-4)


def test_the_callback_hands_over_the_trainers_optimizer(tmp_path):
    from transformers import Trainer, TrainingArguments

    tasks = TaskSet.from_datasets(toy.sft_tasks(train=6, validation=3))
    config = CaptureConfig(projection_dim=16, preconditioner="optimizer")
    callback = GradientCaptureCallback(tasks, tmp_path / "store", config, when="train_end")
    arguments = TrainingArguments(
        str(tmp_path / "out"), use_cpu=True, max_steps=2, report_to="none", save_strategy="no", disable_tqdm=True
    )
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 8
    model = toy.with_lora(toy.llama())
    Trainer(model, arguments, train_dataset=rows, processing_class=toy.tokenizer(), callbacks=[callback]).train()
    assert callback.store.preconditioner() is not None
    assert callback.store.identity["config"]["preconditioner"] == "optimizer"


def test_a_bfloat16_store_is_near_a_float32_one(tmp_path):
    exact, rounded = (capture(tmp_path / dtype, feature_dtype=dtype) for dtype in ("float32", "bfloat16"))
    found, expected = rounded.table("train").features[:], exact.table("train").features[:]
    assert np.abs(found - expected).max() <= 2**-8 * np.abs(expected).max() and not np.array_equal(found, expected)
