"""Fused LoRA layers, against the same layers with hooks on their parts and against autograd."""

import pytest
import torch
from peft import get_peft_model
from peft.tuners import lora
from transformers import OlmoConfig, OlmoForCausalLM

from helpers import oracles, toy
from helpers.captures import causal_batch, relative_error
from hf_ensemble.capture import GradientExtractor
from hf_ensemble.capture.lora_hooks import _LowRankUpdate


def fusible(extractor):
    return extractor.lora_hooks.fusible(set(extractor.hooked))


def in_parts(model, **settings):
    extractor = GradientExtractor(model, projection_dim=None, **settings)
    extractor.lora_hooks.disabled |= set(extractor.hooked)
    assert not fusible(extractor)
    return extractor


def rows_alone(model, rows):
    def margin_alone(i):
        ids, labels = (torch.tensor([rows[i][key]]) for key in ("input_ids", "labels"))
        return oracles.margins(model(input_ids=ids).logits, labels)[0]

    return oracles.per_example_gradients(model, margin_alone, len(rows))


@pytest.fixture
def own_forwards(monkeypatch):
    """How often a LoRA layer ran its own forward."""
    calls, own = [], lora.Linear.forward

    def counted(layer, *args, **kwargs):
        calls.append(layer)
        return own(layer, *args, **kwargs)

    monkeypatch.setattr(lora.Linear, "forward", counted)
    return calls


@pytest.fixture
def another_forward(monkeypatch):
    """A LoRA layer that looks plain and is not."""
    own = lora.Linear.forward
    monkeypatch.setattr(lora.Linear, "forward", lambda layer, x, *args, **kwargs: own(layer, x, *args, **kwargs) * 1.1)


def test_layers_that_no_batch_uses_cost_no_further_pass(own_forwards):
    model = toy.with_lora(toy.llama())
    model.config.num_hidden_layers = 1
    rows, collator = causal_batch("right")
    extractor = GradientExtractor(model, projection_dim=None)
    first = extractor(collator(rows)).features
    assert {name.split(".")[4] for name in extractor.unused} == {"1"}
    own_forwards.clear()
    assert torch.equal(extractor(collator(rows)).features, first) and not own_forwards


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"bias": "lora_only"}, {"rank_pattern": {"q_proj": 2}, "lora_dropout": 0.3}]
)
def test_plain_layers_skip_their_own_forward(own_forwards, settings, padding_side):
    model = toy.with_lora(toy.llama(attention_bias=True), **settings).train()
    rows, collator = causal_batch(padding_side)
    extractor = GradientExtractor(model, projection_dim=None)
    first = extractor(collator(rows)).features
    assert own_forwards, "the first batch is compared with the layers' own forward"
    own_forwards.clear()
    later = extractor(collator(rows)).features
    assert not own_forwards and torch.equal(first, later)
    assert sum("lora_" in name for name in extractor.parameters) == len(fusible(extractor))
    assert relative_error(later, in_parts(model)(collator(rows)).features) < 1e-5
    assert relative_error(later, rows_alone(model.eval(), rows)) < 1e-5


def test_gradients_go_on_below_a_layer_that_is_not_the_first():
    model = toy.with_lora(toy.llama(), target_modules=["embed_tokens", "q_proj", "down_proj"])
    rows, collator = causal_batch("right")
    extractor = GradientExtractor(model, projection_dim=None)
    assert relative_error(extractor(collator(rows)).features, rows_alone(model, rows)) < 1e-5
    assert 0 < len(fusible(extractor)) < len(extractor.parameters)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_other_layers_run_as_they_are(own_forwards, settings):
    model = toy.with_lora(toy.llama(), **settings)
    rows, collator = causal_batch("right")
    extractor = GradientExtractor(model, projection_dim=None)
    assert not fusible(extractor)
    assert relative_error(extractor(collator(rows)).features, rows_alone(model, rows)) < 1e-5
    assert own_forwards


def test_a_hook_on_a_part_keeps_its_layer_as_it_is():
    model = toy.with_lora(toy.llama())
    layer = next(module for module in model.modules() if type(module) is lora.Linear)
    layer.lora_A["default"].register_forward_hook(lambda module, inputs, output: 3 * output)
    rows, collator = causal_batch("right")
    extractor = GradientExtractor(model, projection_dim=None)
    assert layer not in fusible(extractor).values() and fusible(extractor)
    assert relative_error(extractor(collator(rows)).features, rows_alone(model, rows)) < 1e-5


def test_two_active_adapters_run_as_they_are():
    model = toy.with_lora(toy.llama())
    model.add_adapter("second", toy.lora())
    toy.randomize(model)
    model.base_model.set_adapter(["default", "second"])
    rows, collator = causal_batch("right")
    extractor = GradientExtractor(model, projection_dim=None)
    assert not fusible(extractor)
    assert relative_error(extractor(collator(rows)).features, rows_alone(model, rows)) < 1e-5


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_dropout": 0.3}])
def test_autocast_runs_fused_and_no_further_from_float64_than_autograd(own_forwards, settings):
    model = toy.with_lora(toy.llama(), **settings)
    rows, collator = causal_batch("right", 12)
    extractor = GradientExtractor(model, projection_dim=None, mixed_precision="bf16")
    extractor(collator(rows))
    own_forwards.clear()
    found = extractor(collator(rows)).features
    assert not own_forwards and not extractor.lora_hooks.disabled and not extractor.fallback
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        apart = rows_alone(model, rows)
    in_float64 = rows_alone(model.double(), rows)
    assert 1e-3 < (apart - in_float64).norm() / in_float64.norm() < 0.1
    assert (found - in_float64).norm() < 1.5 * (apart - in_float64).norm()


def test_a_float32_output_keeps_its_precision_under_autocast():
    """Quantized layers return their input's data type; only the low-rank update is in the autocast data type."""
    generator = torch.Generator().manual_seed(0)
    result, x, a, b = (torch.randn(shape, generator=generator) for shape in ((6, 5), (6, 4), (2, 4), (5, 2)))
    with torch.autocast("cpu", torch.bfloat16):
        found = _LowRankUpdate.apply(result, x, a, b, 1e-4, torch.bfloat16, None)
    assert found.dtype == torch.float32
    assert (found - (result + 1e-4 * x @ a.T @ b.T)).abs().max() < 1e-5


def test_float32_adapters_on_a_bfloat16_model(own_forwards):
    """What PEFT makes by default: its layers cast the input up and the output down."""
    model = toy.with_lora(toy.llama().to(torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    rows, collator = causal_batch("right")
    extractor = GradientExtractor(model, projection_dim=None)
    extractor(collator(rows))
    own_forwards.clear()
    found = extractor(collator(rows)).features
    assert not own_forwards and not extractor.lora_hooks.disabled
    in_float64 = rows_alone(model.double(), rows)
    apart = in_parts(toy.with_lora(toy.llama().to(torch.bfloat16)))(collator(rows)).features
    assert (found - in_float64).norm() < 1.5 * (apart - in_float64).norm()


def test_an_output_may_be_changed_in_place():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OlmoConfig(vocab_size=len(toy.VOCABULARY), clip_qkv=0.5, pad_token_id=0, **sizes)
    model = get_peft_model(OlmoForCausalLM(config).eval(), toy.lora())
    toy.randomize(model)
    rows, collator = causal_batch("right")
    extractor = GradientExtractor(model, projection_dim=None)
    assert relative_error(extractor(collator(rows)).features, rows_alone(model, rows)) < 1e-5
    assert fusible(extractor)


def test_a_layer_that_does_something_else_is_found_out(another_forward):
    model = toy.with_lora(toy.llama())
    rows, collator = causal_batch("right")
    extractor = GradientExtractor(model, projection_dim=None)
    found = extractor(collator(rows)).features
    assert not fusible(extractor) and not extractor.fallback
    assert relative_error(found, rows_alone(model, rows)) < 1e-5


def test_it_is_found_out_also_after_a_first_batch_with_hooks_on_parts(another_forward):
    model = toy.with_lora(toy.llama())
    rows, collator = causal_batch("right")
    extractor = GradientExtractor(model, projection_dim=None)
    layer = next(module for module in model.modules() if type(module) is lora.Linear)
    handles = [part.register_forward_hook(lambda *_: None) for part in model.modules() if type(part) is lora.Linear]
    assert layer not in fusible(extractor).values()
    extractor(collator(rows))
    for handle in handles:
        handle.remove()
    assert relative_error(extractor(collator(rows)).features, rows_alone(model, rows)) < 1e-5
    assert extractor.lora_hooks.disabled


def test_the_layers_have_their_own_forward_back_also_after_an_error(monkeypatch):
    model = toy.with_lora(toy.llama())
    rows, collator = causal_batch("right")
    before = model(input_ids=torch.tensor([rows[0]["input_ids"]])).logits
    extractor = GradientExtractor(model, projection_dim=None)
    extractor(collator(rows))
    monkeypatch.setattr(extractor, "_scored", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        extractor(collator(rows))
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(model(input_ids=torch.tensor([rows[0]["input_ids"]])).logits, before)


def test_a_layer_with_a_shared_factor_is_left_to_the_fallback():
    model = toy.with_lora(toy.llama())
    first, second = [module for module in model.modules() if type(module) is lora.Linear][:2]
    second.lora_A["default"].weight = first.lora_A["default"].weight
    rows, collator = causal_batch("right")
    extractor = GradientExtractor(model, projection_dim=None)
    found = fusible(extractor)
    assert first not in found.values() and second not in found.values() and found
    assert relative_error(extractor(collator(rows)).features, rows_alone(model, rows)) < 1e-5
    assert extractor.fallback
