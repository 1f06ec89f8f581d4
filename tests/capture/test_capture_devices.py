"""What a capture is made of, on each device: equal to float32 on the CPU."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from peft.tuners.lora import LoraLayer

from helpers import toy
from helpers.captures import causal_batch, relative_error
from helpers.devices import DEVICES
from hf_ensemble._compat import keep_quantized_weights_in_place
from hf_ensemble.capture import GradientExtractor, Preconditioner, SeededProjection, row_update
from hf_ensemble.capture.capture import capture_gradients
from hf_ensemble.capture.config import CaptureConfig
from hf_ensemble.tasks import TaskSet, data_collator_for, encode


def quantized_and_plain(compute_dtype):
    """A model with nf4 weights and an adapter, and the same model with the weights that they stand for."""
    base = toy.llama(hidden_size=64, intermediate_size=128)
    plain = copy.deepcopy(base)
    for name, module in list(base.model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=compute_dtype, quant_type="nf4"
            )
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", module=layer)
            layer.weight = layer.weight.to("cpu")
            base.model.set_submodule(name, layer)
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain.model.get_submodule(name).weight.data = weight.float().view_as(module.weight)
    base.is_loaded_in_4bit = True
    models = toy.with_lora(base), toy.with_lora(plain)
    keep_quantized_weights_in_place(models[0])
    return models


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [None, 64])
def test_4_bit_weights_are_captured_like_what_they_stand_for(device, dim):
    quantized, plain = quantized_and_plain(torch.float32)
    rows, collator = causal_batch("right")
    expected = GradientExtractor(plain, dim)(collator(rows))
    extractor = GradientExtractor(quantized.to(device), dim)
    found = extractor(collator(rows))
    assert relative_error(found.features, expected.features) < 1e-3
    assert relative_error(found.margin, expected.margin) < 1e-3
    layers = [module for module in quantized.modules() if isinstance(module, LoraLayer)]
    assert len(extractor.lora_hooks.fusible(set(extractor.hooked))) == 2 * len(layers) and not extractor.fallback


@pytest.mark.parametrize("device", DEVICES)
def test_4_bit_weights_in_bfloat16_are_near(device):
    quantized, plain = quantized_and_plain(torch.bfloat16)
    rows, collator = causal_batch("right")
    expected = GradientExtractor(plain, 64)(collator(rows)).features
    extractor = GradientExtractor(quantized.to(device), 64, mixed_precision="bf16")
    found = extractor(collator(rows)).features
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.99 and not extractor.fallback


@pytest.mark.parametrize("device", DEVICES)
def test_a_projection_is_the_same_on_every_device(device):
    shapes = {"a": torch.Size([70, 50]), "b": torch.Size([64]), "c": torch.Size([3])}
    here, there = SeededProjection(shapes, 64), SeededProjection(shapes, 64)
    expected, found = torch.zeros(4, 64), torch.zeros(4, 64, device=device)
    for name, shape in shapes.items():
        gradient = torch.randn(4, *shape)
        here.add(expected, name, gradient)
        there.add(found, name, gradient.to(device))
    assert found.device.type == device and torch.allclose(found.cpu(), expected, rtol=1e-5, atol=1e-5)
    w = torch.randn(64)
    moved = there.transpose(w.to(device))
    assert all(torch.equal(moved[name].cpu(), own) for name, own in here.transpose(w).items())


@pytest.mark.parametrize("device", DEVICES)
def test_second_moments_stay_on_the_device_and_are_those_of_the_cpu(device):
    rows, collator = causal_batch("right")
    expected, found = {}, {}
    for _ in range(2):
        GradientExtractor(toy.with_lora(toy.llama())).add_second_moments(collator(rows), expected)
        GradientExtractor(toy.with_lora(toy.llama()).to(device)).add_second_moments(collator(rows), found)
    assert {moment.device.type for moment in found.values()} == {device}
    scales = Preconditioner.from_second_moments(expected).scales
    for name, scale in Preconditioner.from_second_moments(found).scales.items():
        assert torch.allclose(scale, scales[name], rtol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_an_update_from_rows_is_that_of_the_cpu(device, tmp_path):
    tokenizer, tasks = toy.tokenizer(), TaskSet.from_datasets(toy.sft_tasks(train=6, validation=2))
    rows = list(encode(tasks.table("train"), tokenizer, tasks.row_format))
    collator = data_collator_for(tasks.row_format, tokenizer, labels_are_tokens=True)
    updates = []
    for own in ("cpu", device):
        model = toy.with_lora(toy.llama()).to(own)
        config = CaptureConfig(projection_dim=16, batch_size=4)
        store = capture_gradients(model, tasks, config, tmp_path / f"{own}{len(updates)}", tokenizer, disable_tqdm=True)
        updates.append(row_update(model, store, rows, torch.linspace(-1, 1, len(rows)).numpy(), collator, 4))
    for name, update in updates[1].items():
        assert update.device.type == "cpu" and torch.allclose(update, updates[0][name], rtol=1e-3, atol=1e-5)
