"""What a call of the ensemble takes and returns, beside its logits."""

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from helpers import ensembles, toy
from helpers.architectures import MODELS
from helpers.member_kinds import KINDS, NAMES, TASKS, WEIGHTS, llama, make
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.errors import EnsembleError
from hf_ensemble.tasks import LabelSpace


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


def classifier(num_labels, problem):
    base = toy.bert(num_labels)
    base.config.problem_type = problem
    kinds = [{"task_type": "SEQ_CLS", "r": rank, "target_modules": ["query", "value"]} for rank in (4, 8, 2)]
    return make(base.eval(), kinds, 0.4)


PROBLEMS = {
    "regression": (1, "regression", torch.tensor([0.3, -1.0, 2.0, 0.5])),
    "regression, inferred": (1, None, torch.tensor([1, 0, 2, 1])),
    "regression, a column": (1, "regression", torch.tensor([[0.3], [-1.0], [2.0], [0.5]])),
    "several numbers": (3, "regression", torch.arange(12.0).view(4, 3)),
    "several labels": (3, "multi_label_classification", torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])),
    "several labels, inferred": (3, None, torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("combination", ["logits", "weights"])
@torch.no_grad()
def test_the_loss_is_that_of_the_problem_type(batch, combination, problem):
    num_labels, given, labels = PROBLEMS[problem]
    model = classifier(num_labels, given)
    # One adapter alone is that adapter.
    ensemble = PeftEnsembleModel(model, NAMES, {"y": {"third": 1.0}, "x": WEIGHTS["x"]}, combination=combination)
    found = ensemble(**batch, labels=labels, task="y")
    short = ensemble(**batch, labels=labels, task="y", return_logits=False)
    assert short.logits is None and torch.equal(short.loss, found.loss)
    # Of several adapters, it is the loss of the combined logits.
    output = ensemble(**batch, labels=labels, task="x")
    model.set_adapter("third")
    expected = model(**batch, labels=labels.float())
    assert torch.allclose(found.loss, expected.loss, atol=1e-5) and torch.allclose(
        found.logits, expected.logits, atol=1e-5
    )
    error = (output.logits - labels.view_as(output.logits)).square().mean()
    if num_labels == 1 or given == "regression":
        assert torch.allclose(output.loss, error, atol=1e-5)
    assert torch.equal(output.loss, ensemble(**batch, labels=labels, task="x", return_dict=False)[0])


def test_labels_without_a_loss_are_refused_before_the_model_runs(batch):
    model = classifier(3, "multi_label_classification")
    model.get_base_model().register_forward_pre_hook(lambda *_: pytest.fail("The model ran."))
    labels, space = torch.ones(4, 3), LabelSpace(("a", "b", "c"), {"x": (0, 1), "y": (1, 2)})
    plain = PeftEnsembleModel(model, NAMES, WEIGHTS)
    for call, message in (
        (
            lambda: PeftEnsembleModel(model, NAMES, WEIGHTS, combination="probs")(**batch, labels=labels, task="x"),
            "found the combination 'probs'",
        ),
        (
            lambda: PeftEnsembleModel(model, NAMES, WEIGHTS, combination="log_probs")(**batch, labels=labels, task="x"),
            "found the combination 'log_probs'",
        ),
        (
            lambda: PeftEnsembleModel(model, NAMES, WEIGHTS, label_space=space)(**batch, labels=labels, task="x"),
            "found tasks with label sets",
        ),
        (lambda: plain(**batch, labels=labels[:, :2], task="x"), r"labels of the shape \(4, 3\) .* found \(4, 2\)"),
        (lambda: plain.score(labels, "x", **batch), "one class as the label of each row.*multi_label"),
        (lambda: list(plain.member_answers(labels, "x", **batch)), "one class as the label of each row.*multi_label"),
    ):
        with pytest.raises(EnsembleError, match=message):
            call()


@torch.no_grad()
def test_states_of_one_encoder_are_refused():
    base = MODELS["t5"][0](MODELS["t5"][1]).eval()
    model = get_peft_model(base, toy.lora("SEQ_2_SEQ_LM", target_modules=["q", "v"]), "a")
    own, ids = PeftEnsembleModel(model, ["a"]), torch.tensor([[3, 4]])
    states = base.get_encoder()(input_ids=ids)
    call = {"encoder_outputs": states, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(
        EnsembleError, match="encoder_outputs cannot be set: each adapter .* own states. Pass input_ids"
    ):
        own(**call, decoder_input_ids=ids, routing="default")
    with pytest.raises(EnsembleError, match="encoder_outputs cannot be set"):
        own.score(ids, **call)
