"""A name does not make an adapter: an ensemble notices what happened to those it was made of."""

import copy

import pytest
import torch

from helpers import ensembles
from helpers.member_kinds import KINDS, NAMES, WEIGHTS, llama, make
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.errors import EnsembleError

KIND = "saved modules"


def deleted(model):
    model.delete_adapter("second")


def replaced(model):
    config = model.peft_config["second"]
    model.delete_adapter("second")
    model.add_adapter("second", copy.deepcopy(config))


def replaced_with_the_same_configuration(model):
    config = model.peft_config["second"]
    model.delete_adapter("second")
    model.add_adapter("second", config)


def merged(model):
    model.set_adapter("second")
    model.merge_adapter()


def another_merged(model):
    model.add_adapter("other", model.peft_config["second"])
    model.merge_adapter(["other"])


def unloaded(model):
    model.unload()


def merged_and_unloaded(model):
    model.set_adapter("second")
    model.merge_and_unload()


def taken_out(model):
    layer = model.get_base_model().model.layers[0].self_attn
    layer.q_proj = layer.q_proj.get_base_layer()


CASES = {
    deleted: r"adapters \['second'\] were deleted since.*Load the adapters again and make a new PeftEnsembleModel",
    replaced: "adapter 'second' was replaced by another one of the same name.*make a new PeftEnsembleModel",
    replaced_with_the_same_configuration: "adapter 'second' was replaced by another one of the same name",
    merged: r"adapters \['second'\] are merged into the base model.*Call unmerge_adapter\(\)",
    another_merged: r"adapters \['other'\] are merged into the base model",
    unloaded: r"Layers with the adapter 'first' were removed.*unload\(\).*make a new PeftEnsembleModel",
    merged_and_unloaded: r"Layers with the adapter 'first' were removed",
    taken_out: "Layers with the adapter 'first' were removed",
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "in turn"])
@pytest.mark.parametrize("change", CASES, ids=lambda case: case.__name__)
@torch.no_grad()
def test_every_call_notices(change, fused, tmp_path):
    model = make(llama(), KINDS[KIND])
    ensemble = PeftEnsembleModel(model, NAMES, WEIGHTS)
    ensemble.fused = fused
    batch = ensembles.prompts()
    calls = {
        "forward": lambda: ensemble(**batch, task="z"),
        # Also where the weights leave the changed adapter out: the base or the name may be another's by now.
        "without it": lambda: ensemble(**batch, task="y"),
        "generate": lambda: ensemble.generate(**batch, task="z", max_new_tokens=2),
        "score": lambda: ensemble.score(batch["input_ids"], task="z", **batch),
        "members": lambda: next(ensemble.member_answers(batch["input_ids"], **batch)),
        "merge": lambda: ensemble.merge("x", rank=2),
        "save": lambda: ensemble.save_pretrained(tmp_path),
    }
    for call in calls.values():
        call()
    change(model)
    for name, call in calls.items():
        with pytest.raises(EnsembleError, match=CASES[change]):
            call()
            pytest.fail(f"{name} after {change.__name__}")


@torch.no_grad()
def test_what_leaves_the_adapters_as_they_are_is_no_error():
    model = make(llama(), KINDS[KIND])
    ensemble = PeftEnsembleModel(model, NAMES, WEIGHTS)
    batch = ensembles.prompts()
    expected = ensemble(**batch, task="z").logits
    model.add_adapter("other", model.peft_config["second"])
    model.set_adapter("other")
    model.delete_adapter("other")
    model.set_adapter("first")
    model.merge_adapter()
    model.unmerge_adapter()
    model.to(torch.float64).to(torch.float32)
    assert torch.allclose(ensemble(**batch, task="z").logits, expected, atol=1e-5)
    assert torch.allclose(copy.deepcopy(ensemble)(**batch, task="z").logits, expected, atol=1e-5)
    # Trained further, it is still the same adapter.
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_B["first"].weight.mul_(2)
    assert not torch.allclose(ensemble(**batch, task="z").logits, expected, atol=1e-3)


@torch.no_grad()
def test_one_check_for_a_whole_decoding(monkeypatch):
    ensemble = PeftEnsembleModel(make(llama(), KINDS[KIND]), NAMES, WEIGHTS)
    checks = []
    check = ensemble._adapters.check
    monkeypatch.setattr(ensemble._adapters, "check", lambda model: checks.append(1) or check(model))
    ensemble.generate(**ensembles.prompts(), task="z", max_new_tokens=5, eos_token_id=None)
    assert len(checks) == 1


def test_a_member_without_layers_is_refused():
    model = make(llama(), KINDS["ranks and scalings"])
    for module in model.modules():
        if hasattr(module, "lora_A") and "third" in module.lora_A:
            module.delete_adapter("third")
    with pytest.raises(EnsembleError, match="Expected layers with the adapter 'third', found none"):
        PeftEnsembleModel(model, NAMES)
