"""Weights of unknown tasks' rows from the hidden states of their prompts."""

import numpy as np
import pytest
import torch

from helpers import toy
from helpers.member_kinds import KINDS, NAMES, llama, make
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.ensemble import EnsembleMember, fit_router
from hf_ensemble.ensemble.forward.router import PromptRouter, prompt_states, without_light
from hf_ensemble.ensemble.weighting.collation import default_collator
from hf_ensemble.ensemble.weighting.collector import AnswerCollector, CollectedAnswers
from hf_ensemble.ensemble.weighting.router_fitting import fit_prompt_router
from hf_ensemble.errors import EnsembleError, EnsembleLoadError
from hf_ensemble.models.usage import measured_usage
from hf_ensemble.tasks import LabelSpace


def world(seed, rows=80, kinds=3, width=12):
    """Each kind of row is answered well by one adapter, and known by the direction of its states."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, kinds, rows)
    targets = rng.integers(0, 4, rows)
    logits = rng.normal(size=(kinds, rows, 4))
    logits[kind, np.arange(rows), targets] += 3.0
    states = 2 * np.eye(width)[kind] + 0.5 * rng.normal(size=(rows, width)) + 5
    answers = CollectedAnswers(torch.from_numpy(logits).float(), torch.from_numpy(targets), torch.arange(rows))
    return answers, torch.from_numpy(states).float(), kind


@pytest.mark.parametrize("combination", ["logits", "probs"])
def test_the_router_finds_what_decides_and_not_the_tasks_name(combination):
    # Both tasks hold rows of every kind: a task's name says nothing.
    made = {task: world(seed) for task, seed in (("x", 0), ("y", 1))}
    fit = fit_prompt_router(
        {task: own[0] for task, own in made.items()}, {task: own[1] for task, own in made.items()}, combination
    )
    assert fit.chosen.startswith("adapters, ") and fit.losses[fit.chosen] < fit.losses["constant"] - 0.1
    # Which task a prompt is of says nothing here.
    assert min(fit.losses[name] for name in fit.losses if name.startswith("tasks")) > fit.losses["constant"] - 0.05
    test, states, kind = world(2, rows=400)
    weights = fit.router.weights(states)
    assert (weights.argmax(1).numpy() == kind).mean() > 0.95
    assert torch.allclose(weights.sum(1), torch.ones(400))
    equal = test.row_losses(np.full((1, 3), 1 / 3), combination).mean()
    best = test.routed_losses(torch.from_numpy(np.eye(3)[kind]), combination).mean()
    routed = test.routed_losses(weights, combination).mean()
    assert equal - routed > 0.8 * (equal - best)


def test_states_that_say_nothing_give_constant_weights():
    answers, states, _ = world(3)
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=states.shape)).float()
    fit = fit_prompt_router({"x": answers}, {"x": noise}, "logits")
    weights = fit.router.weights(torch.randn(50, states.shape[1]))
    assert fit.chosen in ("constant", "adapters, 1.0", "adapters, 10.0") and float(weights.std(0).max()) < 0.1


def noisy_tasks(seed, rows, tasks=6, kinds=3, width=12, spread=0.3, gain=1.0):
    """Each task is answered best by one adapter on the whole, and by any in a row; its prompts have a direction."""
    rng = np.random.default_rng(seed)
    made = {}
    for task in range(tasks):
        targets = rng.integers(0, 4, rows)
        logits = 2 * rng.normal(size=(kinds, rows, 4))
        logits[task % kinds, np.arange(rows), targets] += gain
        states = 2 * np.eye(width)[task] + spread * rng.normal(size=(rows, width))
        answers = CollectedAnswers(torch.from_numpy(logits).float(), torch.from_numpy(targets), torch.arange(rows))
        made[str(task)] = (answers, torch.from_numpy(states).float())
    return made


@pytest.mark.parametrize("combination", ["logits", "probs"])
def test_where_rows_say_little_the_tasks_that_prompts_are_like_decide(combination):
    made = noisy_tasks(0, rows=40)
    fit = fit_prompt_router(*({task: own[i] for task, own in made.items()} for i in (0, 1)), combination)
    assert fit.chosen.startswith("tasks, ") and fit.router.mixtures.shape == (6, 3)
    gained = possible = 0.0
    for task, (answers, states) in noisy_tasks(1, rows=2000).items():
        equal = answers.row_losses(np.full((1, 3), 1 / 3), combination).mean()
        known = fit.router.mixtures[int(task)][None].double().numpy()
        possible += equal - answers.row_losses(known, combination).mean()
        weights = fit.router.weights(states)
        assert torch.allclose(weights.sum(1), torch.ones(2000))
        gained += equal - answers.routed_losses(weights, combination).mean()
    assert possible > 0.1 and gained > 0.9 * possible


def test_more_prompts_tell_tasks_apart_that_few_answered_rows_do_not():
    world = {"width": 40, "spread": 1.0, "gain": 2.5}
    prompts = {task: own[1] for task, own in noisy_tasks(2, rows=600, **world).items()}
    test = noisy_tasks(1, rows=500, **world)

    def fitted(more_states):
        made = noisy_tasks(0, rows=40, **world)
        fit = fit_prompt_router(
            *({task: own[i] for task, own in made.items()} for i in (0, 1)), "logits", 0, more_states
        )
        routed = [own.routed_losses(fit.router.weights(states), "logits").mean() for own, states in test.values()]
        return fit, np.mean(routed)

    (alone, loss), (helped, lower) = fitted(None), fitted(prompts)
    assert lower < loss - 0.04
    # Known before, from rows that were left out.
    assert helped.chosen.startswith("tasks, ")
    assert helped.losses[helped.chosen] == pytest.approx(lower, abs=0.03) and alone.losses[alone.chosen] > lower
    # Of a single task only, and of none.
    assert fitted({"3": prompts["3"]})[0].losses.keys() == alone.losses.keys()
    assert fitted({})[0].losses == alone.losses


def test_tasks_may_have_a_single_row():
    made = noisy_tasks(0, rows=1) | {"7": noisy_tasks(1, rows=40)["1"]}
    fit = fit_prompt_router(*({task: own[i] for task, own in made.items()} for i in (0, 1)), "logits")
    assert np.isfinite(list(fit.losses.values())).all()
    weights = fit.router.weights(torch.randn(5, 12))
    assert torch.allclose(weights.sum(1), torch.ones(5), atol=1e-5)


def test_routed_losses_are_those_of_each_rows_own_weights():
    answers, _, _ = world(4, rows=9)
    weights = torch.softmax(torch.randn(9, 3), 1)
    for combination in ("logits", "probs"):
        whole = answers.routed_losses(weights, combination)
        by_row = [answers.row_losses(own[None].numpy(), combination)[0, row] for row, own in enumerate(weights)]
        assert whole == pytest.approx(by_row, abs=1e-5)


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


def test_the_lightest_adapters_are_left_out_while_they_have_a_twentieth_together():
    shares = torch.tensor([[0.9, 0.02, 0.02, 0.06], [0.25, 0.25, 0.25, 0.25], [0.93, 0.03, 0.031, 0.009]])
    expected = torch.tensor([[0.9, 0.0, 0.0, 0.06], [0.25, 0.25, 0.25, 0.25], [0.93, 0.0, 0.031, 0.0]])
    found = without_light(shares)
    assert torch.equal(found > 0, expected > 0)
    assert torch.allclose(found, expected / expected.sum(1, keepdim=True))
    # Of many adapters, all of which weigh little, few are left out.
    many = without_light(torch.full((1, 40), 1 / 40))
    assert int((many > 0).sum()) >= 38 and many.sum() == pytest.approx(1)


def test_what_is_left_out_is_left_out_where_routers_are_compared():
    rng = np.random.default_rng(0)
    answers = {}
    for task in ("x", "y"):
        targets = rng.integers(0, 4, 60)
        logits = rng.normal(size=(30, 60, 4))
        logits[:, np.arange(60), targets] += 1.0
        answers[task] = CollectedAnswers(torch.from_numpy(logits).float(), torch.from_numpy(targets), torch.arange(60))
    fit = fit_prompt_router(answers, {task: torch.randn(60, 8) for task in answers}, "logits")
    # Thirty adapters with noises of their own are as good as together.
    equal = np.mean([own.row_losses(np.full((1, 30), 1 / 30), "logits").mean() for own in answers.values()])
    best = fit.router.weights(torch.randn(1, 8))
    served = np.mean([own.routed_losses(best.expand(60, -1), "logits").mean() for own in answers.values()])
    assert abs(served - equal) < 0.1


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
