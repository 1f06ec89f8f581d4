"""Ensembles of adapters of other PEFT methods than LoRA and IA3."""

import json

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from helpers import ensembles, toy
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.errors import EnsembleError, EnsembleLoadError

NAMES = ["first", "second"]
ROWS = {"x": {"first": 0.3, "second": 0.7}, "y": {"second": 1.0}}
ON = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
CONFIGS = {
    "LoHa": peft.LoHaConfig(**ON, r=2),
    "LoKr": peft.LoKrConfig(**ON, r=2, decompose_factor=4),
    "OFT": peft.OFTConfig(**ON, r=0, oft_block_size=4),
    "BOFT": peft.BOFTConfig(**ON, boft_block_size=4),
    "HRA": peft.HRAConfig(**ON, r=2),
    "VeRA": peft.VeraConfig(**{**ON, "target_modules": ["q_proj"]}, r=4),
    "FourierFT": peft.FourierFTConfig(**ON, n_frequency=8),
    "C3A": peft.C3AConfig(**ON, block_size=8),
}


def make(config):
    model = get_peft_model(toy.llama(), config, adapter_name="first")
    model.add_adapter("second", config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f".{adapter}" in name for adapter in NAMES):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("method", CONFIGS)
@torch.no_grad()
def test_members_are_weighed_saved_loaded_and_loaded_alone(method, tmp_path):
    model = make(CONFIGS[method])
    batch = {"input_ids": torch.randint(3, 30, (2, 6))}
    ensemble = PeftEnsembleModel(model, NAMES, ROWS).eval()
    outputs = ensembles.outputs_of(model, NAMES, batch)
    assert not torch.allclose(outputs["first"], outputs["second"], atol=1e-3)
    expected = ensembles.weighted_logits(model, NAMES, batch, list(ROWS.values()))
    ensemble.save_pretrained(tmp_path)
    loaded = PeftEnsembleModel.from_pretrained(tmp_path, base_model=toy.llama())
    for own in (ensemble, loaded):
        for fused in (True, False):
            own.fused = fused
            assert torch.allclose(own(**batch, task=list(ROWS)).logits, expected, atol=1e-4)
    alone = PeftModel.from_pretrained(toy.llama(), tmp_path / "adapters" / "second").eval()
    assert torch.allclose(alone(**batch).logits, outputs["second"], atol=1e-4)
    ensemble.combination = "weights"
    assert torch.allclose(ensemble(**batch, task="y").logits, outputs["second"], atol=1e-4)
    with pytest.raises(EnsembleError, match=f"type {CONFIGS[method].peft_type.value}, which cannot be merged"):
        ensemble.merge("x")
    assert ensemble.vllm_obstacles()["first"] == [f"an adapter of type {CONFIGS[method].peft_type.value}"]


def damaged(folder, change=None, tensors=None):
    own = folder / "adapters" / "first"
    if change is not None:
        config = json.loads((own / "adapter_config.json").read_text()) | change
        (own / "adapter_config.json").write_text(json.dumps(config))
    if tensors is not None:
        path = own / "adapter_model.safetensors"
        save_file(tensors(load_file(path)), path, metadata={"format": "pt"})
    return PeftEnsembleModel.from_adapters(toy.llama(), {"first": own})


@pytest.mark.parametrize(
    ("change", "tensors", "message"),
    [
        ({"r": 10**9}, None, "states r 1000000000"),
        (None, lambda own: {**own, "base_model.model.lm_head.weight": torch.ones(45, 32)}, "lm_head"),
        (None, lambda own: dict(list(own.items())[1:]), "lacks 1 tensors"),
        (None, lambda own: {key: value[:, :1].contiguous() for key, value in own.items()}, "does not fit"),
        (None, lambda own: {key.replace("hada_w1_a", "hra_u"): v for key, v in own.items()}, "does not belong"),
        (None, lambda own: {key: value * float("inf") for key, value in own.items()}, "not finite"),
    ],
)
def test_damaged_adapters_are_refused(tmp_path, change, tensors, message):
    PeftEnsembleModel(make(CONFIGS["LoHa"]), NAMES, ROWS).save_pretrained(tmp_path)
    with pytest.raises(EnsembleLoadError, match=message):
        damaged(tmp_path, change, tensors)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("LoHa", {"rank_pattern": {"q_proj": 10**9}}, "states rank_pattern of 'q_proj' 1000000000"),
        ("LoKr", {"rank_pattern": {"v_proj": 10**9}}, "states rank_pattern of 'v_proj' 1000000000"),
        ("FourierFT", {"n_frequency_pattern": {"q_proj": 10**9}}, "states n_frequency_pattern of 'q_proj' 1000000000"),
        ("C3A", {"block_size_pattern": {"q_proj": 10**9}}, "states block_size_pattern of 'q_proj' 1000000000"),
        ("C3A", {"block_size_pattern": {"q_proj": -8}}, "has the size -8"),
        ("FourierFT", {"n_frequency_pattern": {"q_proj": "8"}}, "has the size '8'"),
        ("LoHa", {"rank_pattern": {"q_proj": 0}}, "has the rank 0"),
        ("LoHa", {"rank_pattern": [2]}, "has rank_pattern"),
        ("LoHa", {"alpha": float("inf")}, "has the scaling inf"),
        ("LoKr", {"alpha_pattern": {"q_proj": float("nan")}}, "has the scaling nan"),
        ("FourierFT", {"scaling": "300"}, "has the scaling '300'"),
    ],
)
def test_hostile_configurations_are_refused_before_peft_allocates(tmp_path, method, change, message):
    PeftEnsembleModel(make(CONFIGS[method]), NAMES, ROWS).save_pretrained(tmp_path)
    with pytest.raises(EnsembleLoadError, match=message):
        damaged(tmp_path, change)


@torch.no_grad()
def test_ranks_and_scalings_by_module_stay(tmp_path):
    config = peft.LoHaConfig(**ON, r=2, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 2})
    model, batch = make(config), {"input_ids": torch.randint(3, 30, (2, 6))}
    PeftEnsembleModel(model, NAMES, ROWS).save_pretrained(tmp_path)
    loaded = PeftEnsembleModel.from_pretrained(tmp_path, base_model=toy.llama())
    expected = ensembles.weighted_logits(model, NAMES, batch, list(ROWS.values()))
    assert torch.allclose(loaded(**batch, task=list(ROWS)).logits, expected, atol=1e-4)
