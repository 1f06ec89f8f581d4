"""Which router is fitted to answers and hidden states, and which adapters it leaves out."""

import numpy as np
import pytest
import torch

from hf_ensemble.ensemble.forward.router import without_light
from hf_ensemble.ensemble.weighting.collector import CollectedAnswers
from hf_ensemble.ensemble.weighting.router_fitting import fit_prompt_router


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


def test_the_lightest_adapters_are_left_out_while_they_have_a_twentieth_together():
    shares = torch.tensor([[0.9, 0.02, 0.02, 0.06], [0.25, 0.25, 0.25, 0.25], [0.93, 0.03, 0.031, 0.009]])
    expected = torch.tensor([[0.9, 0.0, 0.0, 0.06], [0.25, 0.25, 0.25, 0.25], [0.93, 0.0, 0.031, 0.0]])
    found = without_light(shares)
    assert torch.equal(found > 0, expected > 0)
    assert torch.allclose(found, expected / expected.sum(1, keepdim=True))
    # Of many adapters, all of which weigh little, few are left out.
    many = without_light(torch.full((1, 40), 1 / 40))
    assert int((many > 0).sum()) >= 38 and many.sum() == pytest.approx(1)


def test_many_adapters_that_weigh_little_stay():
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
