"""Ensembles of IA3 adapters."""

import copy

import pytest
import torch
from peft import IA3Config, get_peft_model
from peft.tuners.ia3 import IA3Layer

from helpers import ensembles, toy
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.errors import EnsembleError

NAMES = ["first", "second"]
ROWS = {"x": {"first": 0.3, "second": 0.9}, "y": {"second": 1.0}}


@pytest.fixture(scope="module")
def model():
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = get_peft_model(toy.llama(), config, adapter_name="first")
    model.add_adapter("second", config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.mul_(1 + torch.randn(parameter.shape))
    return model.eval()


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_logits_are_the_weighted_sum_and_survive_saving(model, fused, tmp_path):
    batch = {"input_ids": torch.randint(3, 30, (2, 6))}
    ensemble = PeftEnsembleModel(model, NAMES, ROWS).eval()
    ensemble.fused = fused
    expected = ensembles.weighted_logits(model, NAMES, batch, list(ROWS.values()))
    assert torch.allclose(ensemble(**batch, task=list(ROWS)).logits, expected, atol=1e-5)
    ensemble.save_pretrained(tmp_path / "saved")
    loaded = PeftEnsembleModel.from_pretrained(tmp_path / "saved", base_model=toy.llama())
    assert torch.allclose(loaded(**batch, task=list(ROWS)).logits, expected, atol=1e-5)


@torch.no_grad()
def test_weights_are_the_base_and_the_weighted_changes(model):
    ensemble = PeftEnsembleModel(model, NAMES, ROWS, combination="weights").eval()
    batch = {"input_ids": torch.randint(3, 30, (2, 6))}
    found = ensemble(**batch, task=list(ROWS)).logits
    for row, weights in enumerate(ROWS.values()):
        changed = copy.deepcopy(model)
        for module in changed.modules():
            if isinstance(module, IA3Layer):
                weight = module.get_base_layer().weight
                factors = [share * (module.ia3_l[name] - 1) for name, share in weights.items()]
                weight.data = weight * (1 + sum(factors))
        assert torch.allclose(found[row], changed.unload()(**batch).logits[row], atol=1e-5)


def test_there_is_no_lora_adapter_that_does_the_same(model):
    ensemble = PeftEnsembleModel(model, NAMES, ROWS)
    with pytest.raises(EnsembleError, match="adapters of type IA3, which cannot be merged"):
        ensemble.merge("x")
    assert ensemble.vllm_obstacles() == dict.fromkeys(NAMES, ["an adapter of type IA3"])
