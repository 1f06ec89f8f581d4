"""Ensembles over bases with recurrent states, which are caches of another name and without a length."""

import pytest
import torch
import transformers as hf

from helpers import ensembles, toy
from helpers.member_kinds import NAMES, TASKS, WEIGHTS, make
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.errors import EnsembleError

WORDS = len(toy.VOCABULARY)
_SIZE = {"vocab_size": WORDS, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.5}
_SIZE |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
BASES = {
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(**_SIZE)),
    "falcon mamba": lambda: hf.FalconMambaForCausalLM(hf.FalconMambaConfig(**_SIZE)),
    "mamba2": lambda: hf.Mamba2ForCausalLM(
        hf.Mamba2Config(**_SIZE, num_heads=4, head_dim=8, expand=2, n_groups=1, chunk_size=8)
    ),
}
STEPS = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


def ensemble_of(base, combination="logits", targets=("in_proj",)):
    kinds = [{"r": rank, "target_modules": list(targets)} for rank in (4, 8, 2)]
    weights = {**WEIGHTS, "minus": {"first": 0.2, "third": 0.8}}
    return PeftEnsembleModel(make(base.eval(), kinds, 0.4), NAMES, weights, combination=combination)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("combination", ["logits", "probs", "weights"])
@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_the_cache_changes_nothing(base, combination, fused):
    torch.manual_seed(0)
    ensemble = ensemble_of(BASES[base](), combination)
    ensemble.fused = fused
    batch = ensembles.prompts()
    for options in ({}, {"num_beams": 2}):
        expected = ensemble.generate(**batch, task=TASKS, use_cache=False, **STEPS, **options)
        assert torch.equal(ensemble.generate(**batch, task=TASKS, **STEPS, **options), expected)
    ids, cache = batch["input_ids"], None
    new = ids
    for _ in range(3):
        output = ensemble(new, task=TASKS, past_key_values=cache, use_cache=True)
        assert torch.allclose(output.logits[:, -1], ensemble(ids, task=TASKS).logits[:, -1], atol=1e-4)
        cache, new = output.past_key_values, output.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], 1)
    assert cache is not None
    # By the base's own name, too.
    again = ensemble(new, task=TASKS, cache_params=cache).logits[:, -1]
    assert torch.allclose(again, ensemble(ids, task=TASKS).logits[:, -1], atol=1e-4)


@torch.no_grad()
def test_states_that_cannot_be_kept_for_each_adapter_are_not_kept(caplog):
    torch.manual_seed(0)
    base = hf.RwkvForCausalLM(hf.RwkvConfig(vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, bos_token_id=3))
    ensemble = ensemble_of(base, targets=("receptance",))
    ids = ensembles.prompts()["input_ids"]
    expected = ensemble.generate(ids, task=TASKS, use_cache=False, **STEPS)
    assert not caplog.text and torch.equal(ensemble.generate(ids, task=TASKS, **STEPS), expected)
    assert "RwkvForCausalLM keeps states of a kind of its own" in caplog.text
    with pytest.raises(EnsembleError, match="Expected use_cache=False, found True: RwkvForCausalLM keeps"):
        ensemble(ids, task=TASKS, use_cache=True)
