"""Adam's metric: second moments of the training gradients."""

import numpy as np
import pytest
import torch

from helpers import toy
from helpers.captures import capture, relative_error
from hf_ensemble.capture import CaptureConfig, GradientExtractor, Preconditioner, capture_gradients
from hf_ensemble.errors import CaptureError, StoreError
from hf_ensemble.store import GradientStore
from hf_ensemble.tasks import TaskSet, data_collator_for, encode


@pytest.fixture
def encoded():
    tokenizer, tasks = toy.tokenizer(), TaskSet.from_datasets(toy.sft_tasks(train=5, validation=2))
    rows = list(encode(tasks.table("train"), tokenizer, tasks.row_format))
    return rows, data_collator_for(tasks.row_format, tokenizer, labels_are_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 4, 15])
def test_second_moments_are_squares_of_each_examples_loss_gradient(encoded, batch_size):
    rows, collator = encoded
    model = toy.with_lora(toy.llama())
    toy.randomize(model)
    extractor = GradientExtractor(model, None)
    found = {}
    for start in range(0, len(rows), batch_size):
        extractor.add_second_moments(collator(rows[start : start + batch_size]), found)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in rows:
        batch = dict(collator([row]))
        # With one example in the batch, transformers' own loss is the mean token loss: the surrogate's at w = 0.
        loss = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values()))):
            expected[name] += gradient.square()
    assert found.keys() == expected.keys()
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-4


def test_parameters_without_hooks_count_too(encoded):
    rows, collator = encoded
    model = toy.with_lora(toy.llama())
    toy.randomize(model)
    hooked, alone = GradientExtractor(model, None), GradientExtractor(model, None)
    alone.hooked = []
    moments = [{}, {}]
    for extractor, own in zip((hooked, alone), moments):
        extractor.add_second_moments(collator(rows[:4]), own)
    assert alone.fallback and not hooked.fallback
    for name, moment in moments[0].items():
        assert relative_error(moments[1][name], moment) < 1e-4


def test_a_batch_that_runs_out_of_memory_is_counted_once(encoded, monkeypatch):
    rows, collator = encoded
    extractor = GradientExtractor(toy.with_lora(toy.llama()), None)
    extractor.add_second_moments(collator(rows[:4]), expected := {})
    zeros, shapes, moments = torch.zeros, [own.shape for own in extractor.parameters.values()], {}

    def full(*size, **options):
        # Room for the moments of the first parameter alone.
        if moments and size == (shapes[1],):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return zeros(*size, **options)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "zeros", full)
        extractor.add_second_moments(collator(rows[:4]), moments)
    assert moments
    extractor.add_second_moments(collator(rows[:4]), moments)
    assert all(torch.allclose(moments[name], own) for name, own in expected.items())


def test_scales_are_the_fourth_root_relative_to_the_mean():
    moments = {"a": torch.tensor([16.0, 0.0]), "b": torch.tensor([[1.0], [1.0]])}
    scales = Preconditioner.from_second_moments(moments).scales
    mean = 18 / 3
    assert scales["a"][0] == pytest.approx((16 / mean + 1e-3) ** -0.25)
    assert scales["a"][1] == pytest.approx(1e-3**-0.25)
    assert scales["b"].flatten().tolist() == pytest.approx(2 * [(1 / mean + 1e-3) ** -0.25])
    # The unit of the gradients does not matter.
    again = Preconditioner.from_second_moments({name: 1e-12 * moment for name, moment in moments.items()}).scales
    assert torch.allclose(again["a"], scales["a"]) and torch.allclose(again["b"], scales["b"])
    with pytest.raises(CaptureError, match="Expected a training row with a finite and nonzero gradient"):
        Preconditioner.from_second_moments({"a": torch.zeros(2)})


def test_features_are_the_plain_ones_times_the_scales(tmp_path):
    settings = {"projection_dim": None}
    plain = capture(tmp_path / "plain", preconditioner="none", **settings)
    scaled = capture(tmp_path / "scaled", **settings)
    assert plain.preconditioner() is None and "preconditioner_sha256" not in plain.manifest
    scales = np.concatenate([scale.ravel() for scale in scaled.preconditioner().values()])
    names = [name for name, p in toy.with_lora(toy.llama()).named_parameters() if p.requires_grad]
    by_name = np.concatenate([scaled.preconditioner()[name].ravel() for name in names])
    assert len(scales) == plain.dim and np.ptp(scales) > 0.1
    found, expected = scaled.table("train").features[:], plain.table("train").features * by_name
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert (scaled.table("train").margin == plain.table("train").margin).all()


def test_it_is_the_same_for_every_batch_size(tmp_path):
    stores = [capture(tmp_path / str(size), batch_size=size) for size in (3, 16)]
    first, second = (store.preconditioner() for store in stores)
    assert all(np.allclose(first[name], second[name], rtol=1e-4) for name in first)


def test_a_resumed_pass_keeps_the_stores_own(tmp_path, monkeypatch):
    from hf_ensemble.store import GradientStoreWriter

    def killed(self, shard, rows, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GradientStoreWriter, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            capture(tmp_path)

    def never(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(GradientExtractor, "add_second_moments", never)
    assert capture(tmp_path).preconditioner()


def test_a_lost_or_altered_file_is_named_and_made_again(tmp_path):
    before = capture(tmp_path).preconditioner()
    file = tmp_path / "preconditioner.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StoreError, match="was altered .*Delete preconditioner.safetensors"):
        GradientStore(tmp_path)
    file.unlink()
    with pytest.raises(StoreError, match="preconditioner.safetensors is missing"):
        GradientStore(tmp_path)
    # Another batch size adds up in another order: the checksum goes with the file.
    again = capture(tmp_path, batch_size=7).preconditioner()
    assert all(np.allclose(again[name], scale, rtol=1e-4) for name, scale in before.items())
    file.write_bytes(data[:100])
    with pytest.raises(StoreError, match="is damaged.* Delete it and capture again"):
        capture(tmp_path)


def test_one_step_of_adam_is_a_gradient_step_in_the_scaled_coordinates(tmp_path):
    """Adam with the second moments at theta0 moves the margins along K r, K the features' inner products."""
    tasks = TaskSet.from_datasets(toy.sft_tasks(train=8, validation=4))
    model = toy.with_lora(toy.llama())
    settings = {"projection_dim": None, "feature_dtype": "float32"}
    plain, scaled = (
        capture_gradients(
            model, tasks, CaptureConfig(preconditioner=kind, **settings), tmp_path / kind, toy.tokenizer()
        ).table("train")
        for kind in ("none", "adam")
    )
    r = 1 / (1 + np.exp(plain.margin.astype(np.float64)))
    g = r @ plain.features
    v = np.mean((r[:, None] * plain.features) ** 2, axis=0)
    step = np.where(g != 0, g / np.sqrt(v + 1e-3 * v[v > 0].mean()), 0)
    moved, expected = plain.features @ step, scaled.features @ (r @ scaled.features)
    assert np.corrcoef(moved, expected)[0, 1] > 1 - 1e-6
