"""Decoding by hand with a cache, of rows whose weights their prompts decide."""

import pytest
import torch
from transformers import DynamicCache

from helpers import ensembles
from helpers.member_kinds import KINDS, NAMES, WEIGHTS, llama, make
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.errors import EnsembleError

STEPS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def ensemble():
    made = PeftEnsembleModel(make(llama(), KINDS["ranks and scalings"], 0.4), NAMES, WEIGHTS)
    rows = {
        task: [{"input_ids": [*prompt, 5, 6], "labels": [-100, -100, 5, 6]} for _ in range(6)]
        for task, prompt in (("x", [3, 4]), ("y", [12, 20]))
    }
    made.fit_router(rows)
    return made


@pytest.fixture
def batch():
    return ensembles.prompts()


def decoded(ensemble, batch, steps, with_mask=True, **options):
    """Logits of the last token at each step, and the texts."""
    ids, mask, cache, logits = batch["input_ids"], batch["attention_mask"], None, []
    new = ids
    for _ in range(steps):
        given = {}
        if with_mask:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
            given = {"attention_mask": mask, "position_ids": positions}
        output = ensemble(new, past_key_values=cache, use_cache=True, **given, **options)
        logits.append(output.logits[:, -1])
        cache, new = output.past_key_values, output.logits[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    return logits, ids


@pytest.mark.parametrize("routing", ["prompt", "hidden_states"])
@pytest.mark.parametrize("combination", ["logits", "probs", "weights"])
@pytest.mark.parametrize("task", [None, ["x", None, "y", "unknown"]])
@torch.no_grad()
def test_the_prompts_decide_at_every_step(ensemble, batch, routing, combination, task):
    ensemble = PeftEnsembleModel(ensemble.model, NAMES, WEIGHTS, combination=combination, router=ensemble.router)
    weights = ensemble._routed_weights(task, routing, batch)
    assert not torch.allclose(weights, ensemble.row_weights(task, 4), atol=0.01)
    _, texts = decoded(ensemble, batch, 4, task=task, routing=routing)
    assert torch.equal(texts, ensemble.generate(**batch, task=task, routing=routing, **STEPS))
    # Without a mask, rows of whole texts.
    batch["input_ids"][batch["attention_mask"] == 0] = 9
    batch["attention_mask"][:] = 1
    weights = ensemble._routed_weights(task, routing, {"input_ids": batch["input_ids"]})
    logits, texts = decoded(ensemble, batch, 3, with_mask=False, task=task, routing=routing)
    for step, found in enumerate(logits):
        expected = ensemble.weighted_logits(weights, {"input_ids": texts[:, : 7 + step]})[:, -1]
        if combination == "probs":
            expected = torch.log_softmax(expected, -1)
        assert torch.allclose(found, expected, atol=1e-4)


@torch.no_grad()
def test_what_generate_returns_goes_on(ensemble, batch):
    output = ensemble.generate(**batch, routing="prompt", return_dict_in_generate=True, **STEPS)
    mask = torch.cat([batch["attention_mask"], torch.ones(4, 4, dtype=torch.long)], 1)
    position = mask.sum(1, keepdim=True) - 1
    options = {"attention_mask": mask, "position_ids": position, "past_key_values": output.past_key_values}
    found = ensemble(output.sequences[:, -1:], routing="prompt", **options).logits[:, -1:].argmax(-1)
    longer = ensemble.generate(**batch, routing="prompt", **{**STEPS, "max_new_tokens": 5})
    assert torch.equal(torch.cat([output.sequences, found], 1), longer)


@torch.no_grad()
def test_caches_that_know_no_weights_are_refused(ensemble, batch):
    ids = batch["input_ids"]
    new = ids[:, :1]
    cache = ensemble(ids, routing="prompt", use_cache=True).past_key_values
    with pytest.raises(EnsembleError, match="the routing gave its 2 prompts; found weights of 4 rows"):
        ensemble(new[:2], routing="prompt", past_key_values=cache)
    with pytest.raises(
        EnsembleError, match="Expected past_key_values of an earlier call of the ensemble, found Dynamic"
    ):
        ensemble(ids, task="x", past_key_values=DynamicCache())
    summed = PeftEnsembleModel(ensemble.model, NAMES, WEIGHTS, combination="weights")
    other = ensemble.model(ids, use_cache=True).past_key_values
    with pytest.raises(EnsembleError, match="found one without weights. Pass task="):
        summed(new, routing="prompt", past_key_values=other)
    with pytest.raises(EnsembleError, match="routing has to be one of"):
        ensemble(new, routing="magic", past_key_values=cache)
    # An empty cache of the base's own kind is filled.
    empty = DynamicCache()
    assert summed(ids, routing="prompt", past_key_values=empty).past_key_values is empty
    summed(new, routing="prompt", past_key_values=empty)
