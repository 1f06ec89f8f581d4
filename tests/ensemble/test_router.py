"""Weights of unknown tasks' rows from the hidden states of their prompts."""

import pytest
import torch

from helpers import toy
from helpers.member_kinds import KINDS, NAMES, llama, make
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.ensemble import EnsembleMember, fit_router
from hf_ensemble.ensemble.forward.router import PromptRouter, prompt_states
from hf_ensemble.ensemble.weighting.collation import default_collator
from hf_ensemble.ensemble.weighting.collector import AnswerCollector
from hf_ensemble.errors import EnsembleError, EnsembleLoadError
from hf_ensemble.models.usage import measured_usage
from hf_ensemble.tasks import LabelSpace


@pytest.fixture(scope="module")
def ensemble():
    made = PeftEnsembleModel(make(llama(), KINDS["ranks and scalings"], 0.4), NAMES)
    torch.manual_seed(0)
    ids = torch.randint(3, 30, (24, 6)).tolist()
    rows = [{"input_ids": own, "labels": [-100] * 3 + own[3:]} for own in ids]
    made.fit = made.fit_router({"x": rows[:12], "y": rows[12:]}, batch_size=5)
    # Something that depends on the prompt.
    torch.manual_seed(1)
    width = len(made.fit.router.mean)
    made.router = PromptRouter(made.fit.router.mean, torch.randn(width, 3), torch.zeros(3), torch.eye(3))
    return made


def test_states_are_of_the_bare_base_and_the_prompt_alone(ensemble):
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 3, 4]])
    labels = torch.tensor([[-100, -100, -100, 8, 9], [-100, -100, -100, 3, 4]])
    base = ensemble.model.get_base_model()
    states = prompt_states(base, {"input_ids": ids}, labels)
    with torch.no_grad():
        found = llama().base_model(input_ids=ids[:1, :3], output_hidden_states=True)
    # The first of two blocks, and the last one behind the final norm.
    assert len(found.hidden_states) == 3
    plain = torch.cat([found.hidden_states[1], found.last_hidden_state], 2).mean(1)
    assert torch.allclose(states[0], plain[0], atol=1e-5) and torch.allclose(states[0], states[1], atol=1e-5)
    # Padding on either side does not matter.
    for mask, padded in (([1, 1, 1, 0, 0], [5, 6, 7, 0, 0]), ([0, 0, 1, 1, 1], [0, 0, 5, 6, 7])):
        found = prompt_states(base, {"input_ids": torch.tensor([padded]), "attention_mask": torch.tensor([mask])})
        assert torch.allclose(found[0], plain[0], atol=1e-5)


def test_what_stands_behind_the_answer_decides_nothing(ensemble):
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 7, 3, 4, 10]])
    labels = torch.tensor([[-100, -100, -100, 8, 9, -100], [-100, -100, -100, 3, 4, -100]])
    for routing in ("hidden_states", "prompt"):
        found = ensemble._routed_weights(None, routing, {"input_ids": ids}, labels)
        alone = ensemble._routed_weights(None, routing, {"input_ids": ids[:1, :3]})
        assert torch.allclose(found, alone.expand(2, -1), atol=1e-5)


def test_a_single_block_has_no_middle():
    base, ids = toy.llama(num_hidden_layers=1).eval(), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = base.base_model(input_ids=ids).last_hidden_state.mean(1)
    assert torch.allclose(prompt_states(base, {"input_ids": ids}), expected, atol=1e-5)


def test_more_prompts_need_no_answers_of_the_adapters(ensemble, monkeypatch):
    rows = rows_of_tasks()
    calls = []
    states = ensemble.prompt_states
    monkeypatch.setattr(
        ensemble, "prompt_states", lambda *own: calls.append(len(own[0]["input_ids"])) or states(*own), raising=False
    )
    found = fit_router(
        ensemble, {name: own[:8] for name, own in rows.items()}, prompts={"x": rows["x"][8:]}, max_prompts=3
    )
    assert sum(calls) == 2 * 8 + 3 and found.losses.keys() == ensemble.fit.losses.keys()
    # They need no labels.
    listed = [{"task": "x", "input_ids": row["input_ids"][:3]} for row in rows["x"][8:]]
    with torch.no_grad():
        again = fit_router(ensemble, {name: own[:8] for name, own in rows.items()}, prompts=listed, max_prompts=3)
    assert again.losses == pytest.approx(found.losses, abs=1e-5)
    with pytest.raises(EnsembleError, match=r"prompts of the tasks whose .*\(x, y\), found prompts of \['z'\]"):
        ensemble.fit_router(rows, prompts={"x": rows["x"], "z": rows["y"]})
    with pytest.raises(EnsembleError, match="max_prompts"):
        ensemble.fit_router(rows, prompts=rows, max_prompts=0)


def test_forward_score_and_generate_take_the_routers_weights(ensemble):
    torch.manual_seed(3)
    ids = torch.randint(3, 30, (4, 6))
    labels = ids.masked_fill(torch.arange(6) < 4, -100)
    weights = ensemble.router.weights(ensemble.prompt_states({"input_ids": ids}, labels))
    assert len(weights.unique(dim=0)) > 1
    by_row = {f"row {k}": dict(zip(NAMES, own.tolist())) for k, own in enumerate(weights)}
    known = PeftEnsembleModel(ensemble.model, NAMES, by_row)
    expected = known.score(labels, task=list(by_row), input_ids=ids)
    found = ensemble.score(labels, routing="hidden_states", input_ids=ids)
    assert torch.allclose(found.log_probs, expected.log_probs, atol=1e-5)
    with torch.no_grad():
        logits = ensemble(input_ids=ids, labels=labels, routing="hidden_states").logits
        assert torch.allclose(logits, known(input_ids=ids, task=list(by_row)).logits, atol=1e-5)
        # A row of a known task keeps its weights.
        ensemble.weights = {"x": {"second": 1.0}}
        mixed = ensemble(input_ids=ids, labels=labels, task=["x", None, None, None], routing="hidden_states").logits
        ensemble.weights = {}
    assert torch.allclose(mixed[1:], logits[1:], atol=1e-5) and not torch.allclose(mixed[0], logits[0], atol=1e-3)
    prompts = ids[:, :4]
    own = ensemble.router.weights(ensemble.prompt_states({"input_ids": prompts}))
    known.weights = {f"row {k}": dict(zip(NAMES, row.tolist())) for k, row in enumerate(own)}
    arguments = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(
        ensemble.generate(prompts, routing="hidden_states", **arguments),
        known.generate(prompts, task=list(known.weights), **arguments),
    )


def test_a_router_is_saved_and_checked(ensemble, tmp_path):
    ensemble.routing = "hidden_states"
    ensemble.save_pretrained(tmp_path)
    ensemble.routing = None
    loaded = PeftEnsembleModel.from_pretrained(tmp_path, base_model=llama())
    assert loaded.routing == "hidden_states"
    for name, own in vars(ensemble.router).items():
        assert torch.equal(own, getattr(loaded.router, name))
    whole = (tmp_path / "router.safetensors").read_bytes()
    (tmp_path / "router.safetensors").write_bytes(whole[:-4] + b"\0\0\0\1")
    with pytest.raises(EnsembleLoadError, match="router.safetensors' is not the router that the ensemble was saved"):
        PeftEnsembleModel.from_pretrained(tmp_path, base_model=llama())
    (tmp_path / "router.safetensors").unlink()
    with pytest.raises(EnsembleLoadError, match="router.safetensors is missing"):
        PeftEnsembleModel.from_pretrained(tmp_path, base_model=llama())
    # Saved without one, none is left.
    (tmp_path / "router.safetensors").write_bytes(whole)
    PeftEnsembleModel(ensemble.model, NAMES).save_pretrained(tmp_path)
    assert not (tmp_path / "router.safetensors").exists()
    assert PeftEnsembleModel.from_pretrained(tmp_path, base_model=llama()).router is None


def test_a_router_of_something_else_is_refused(ensemble, tmp_path):
    tensors = ensemble.router.tensors()
    for bad, members in (
        (tensors, 2),
        ({**tensors, "bias": tensors["mean"]}, 3),
        ({**tensors, "mean": tensors["mean"] * float("nan")}, 3),
        ({**tensors, "bias": tensors["bias"].long()}, 3),
        ({**tensors, "mixtures": tensors["mixtures"] - 0.5}, 3),
        ({**tensors, "mixtures": tensors["mixtures"].flatten()}, 3),
        ({"mean": tensors["mean"]}, 3),
        ({}, 3),
    ):
        with pytest.raises(EnsembleLoadError, match="router"):
            PromptRouter.from_tensors(bad, members)
    small = PromptRouter(torch.zeros(4), torch.zeros(4, 3), torch.zeros(3), torch.zeros(3, 2))
    with pytest.raises(EnsembleError, match="router for 3 adapters, found one for 2"):
        PeftEnsembleModel(ensemble.model, NAMES, router=small)
    with pytest.raises(EnsembleError, match="needs a router.*fit_router"):
        PeftEnsembleModel(ensemble.model, NAMES)(input_ids=torch.tensor([[5, 6]]), routing="hidden_states")
    # Also one that was set later, before anything is written or run.
    other = PeftEnsembleModel(ensemble.model, NAMES)
    for router, message in ((small, "router for 3 adapters"), (ensemble.fit, "A fit has it as its attribute router")):
        other.router = router
        with pytest.raises(EnsembleError, match=message):
            other.save_pretrained(tmp_path / "saved")
        with pytest.raises(EnsembleError, match=message):
            other(input_ids=torch.tensor([[5, 6]]), routing="hidden_states")
    assert not (tmp_path / "saved").exists()


def test_classifiers_are_routed_too():
    model = make(toy.bert(4), [{"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}] * 3)
    space = LabelSpace(("no", "yes", "maybe", "never"), {"x": (0, 1), "y": (1, 2, 3)})
    ensemble = PeftEnsembleModel(model, NAMES, label_space=space)
    torch.manual_seed(0)
    data = {
        task: [{"input_ids": torch.randint(3, 20, (5,)).tolist(), "labels": labels[i % 2]} for i in range(8)]
        for task, labels in (("x", (0, 1)), ("y", (1, 3)))
    }
    fit = ensemble.fit_router(data)
    penalties = ("0.001", "0.01", "0.1", "1.0", "10.0")
    assert fit.losses.keys() == {"constant", *(f"{kind}, {own}" for kind in ("adapters", "tasks") for own in penalties)}
    with torch.no_grad():
        logits = ensemble(input_ids=torch.tensor([[5, 6, 7]]), routing="hidden_states").logits
    assert logits.shape == (1, 4) and bool(logits.isfinite().all())


def rows_of_tasks(count=12):
    torch.manual_seed(0)
    ids = torch.randint(3, 30, (2 * count, 6)).tolist()
    rows = [{"input_ids": own, "labels": [-100] * 3 + own[3:]} for own in ids]
    return {"x": rows[:count], "y": rows[count:]}


def test_rows_are_routed_to_no_boosting_step(tmp_path):
    model = make(llama(), KINDS["ranks and scalings"], 0.4)
    ensemble = PeftEnsembleModel(model, [EnsembleMember("first", is_step=True), *NAMES[1:]])
    alone, whole = PeftEnsembleModel(model, NAMES[1:]), PeftEnsembleModel(model, NAMES)
    torch.manual_seed(2)
    ids = {"input_ids": torch.randint(3, 30, (4, 6))}
    # Whichever predicts the prompt best takes all: also where that is the step, the others' shares sum to 1.
    for own in (ensemble, alone, whole):
        own.routing_temperature = 1e-4
    assert whole._routed_weights(None, "prompt", ids)[:, 0].tolist() == [1, 0, 1, 1]
    for routing in ("prompt", "hidden_states"):
        if routing == "hidden_states":
            assert ensemble.fit_router(rows_of_tasks()).losses == alone.fit_router(rows_of_tasks()).losses
            ensemble.save_pretrained(tmp_path)
            ensemble = PeftEnsembleModel.from_pretrained(tmp_path, base_model=llama())
        found, expected = (own._routed_weights(None, routing, ids) for own in (ensemble, alone))
        assert torch.equal(found[:, 0], torch.zeros(4)) and torch.allclose(found[:, 1:], expected, atol=1e-5)
        assert torch.allclose(found.sum(1), torch.ones(4))


def test_states_count_towards_the_cap_and_their_batches_are_halved(ensemble, monkeypatch):
    rows = rows_of_tasks()["x"]
    width = 2 * ensemble.config.hidden_size

    def collector(max_values, batch_size=8):
        collator = default_collator(ensemble.config)
        return AnswerCollector(ensemble, collator, batch_size, max_values, None, 0, False, "no", values_per_row=width)

    whole, per_token = collector(2**27), 3 * ensemble.num_outputs
    expected = whole.states(rows)
    states, most = ensemble.prompt_states, 3

    def small(inputs, labels):
        if len(labels) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return states(inputs, labels)

    monkeypatch.setattr(ensemble, "prompt_states", small, raising=False)
    with measured_usage() as usage:
        assert torch.allclose(whole.states(rows), expected, atol=1e-5)
    assert usage.tokens >= 12 * 6
    for room in (per_token + width, 5 * (per_token + width) + 1, 7 * per_token):
        capped = collector(room, batch_size=2)
        answers, found = capped("x", rows), capped.states(rows)
        assert len(found) == answers.num_rows and answers.values.numel() + found.numel() <= room
    with pytest.raises(EnsembleError, match=f"Pass max_values={2 * (per_token + width)} or more"):
        ensemble.fit_router(rows_of_tasks(), max_values=2 * per_token)
