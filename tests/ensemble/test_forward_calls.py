"""What a call of the ensemble takes and returns, beside its logits."""

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset

from helpers import ensembles
from helpers.member_kinds import KINDS, NAMES, TASKS, WEIGHTS, llama, make
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.errors import EnsembleError


@pytest.fixture(scope="module")
def ensemble():
    return PeftEnsembleModel(make(llama(), KINDS["ranks and scalings"], 0.4), NAMES, WEIGHTS)


@pytest.fixture
def batch():
    return ensembles.prompts()


@pytest.mark.parametrize("kind", [tuple, np.array, pd.Series, lambda tasks: Dataset.from_dict({"task": tasks})["task"]])
@torch.no_grad()
def test_tasks_come_in_any_sequence(ensemble, batch, kind):
    tasks = kind(TASKS)
    assert torch.equal(ensemble(**batch, task=tasks).logits, ensemble(**batch, task=TASKS).logits)
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(
        ensemble.generate(**batch, task=tasks, **options), ensemble.generate(**batch, task=TASKS, **options)
    )


@pytest.mark.parametrize("combination", ["logits", "weights"])
@torch.no_grad()
def test_a_tuple_holds_what_the_output_holds(ensemble, batch, combination):
    ensemble = PeftEnsembleModel(ensemble.model, NAMES, WEIGHTS, combination=combination)
    for options in ({}, {"use_cache": True}, {"return_logits": False, "labels": batch["input_ids"]}):
        options = {**batch, "labels": None, "task": TASKS, **options}
        expected = ensemble(**options)
        found = ensemble(**options, return_dict=False)
        assert type(found) is tuple and len(found) == len(expected)
        for own, other in zip(found, expected.values()):
            assert not torch.is_tensor(own) or torch.equal(own, other)
    labels = batch["input_ids"]
    loss, logits = ensemble(**batch, task=TASKS, labels=labels, return_dict=False)
    whole = ensemble(**batch, task=TASKS, labels=labels)
    assert torch.equal(loss, whole.loss) and torch.equal(logits, whole.logits)
    assert torch.equal(ensemble.for_task("x")(**batch, return_dict=False)[0], ensemble(**batch, task="x").logits)
    assert torch.equal(
        ensemble.score(labels, TASKS, **batch, return_dict=False).loss, ensemble.score(labels, TASKS, **batch).loss
    )


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_states_that_an_ensemble_lacks_are_refused(ensemble, batch, name):
    labels = batch["input_ids"]
    for call in (
        lambda: ensemble(**batch, task="x", **{name: True}),
        lambda: ensemble.score(labels, "x", **batch, **{name: True}),
        lambda: ensemble.for_task("x")(**batch, **{name: True}),
    ):
        with pytest.raises(EnsembleError, match=f"{name} cannot be set: .* no attentions or hidden states"):
            call()
    assert ensemble(**batch, task="x", **{name: False}).logits is not None
