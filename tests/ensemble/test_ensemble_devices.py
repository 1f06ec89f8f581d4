"""An ensemble on each device: the CPU's logits and texts, at once and one after the other."""

import pytest
import torch

from helpers import ensembles
from helpers.devices import DEVICES
from helpers.member_kinds import KINDS, NAMES, TASKS, WEIGHTS, llama, make
from hf_ensemble import PeftEnsembleModel

COMBINATIONS = ("logits", "log_probs", "probs", "weights")
# A mean of distributions takes no negative weight.
POSITIVE = {task: {name: abs(weight) for name, weight in own.items()} for task, own in WEIGHTS.items()}


def ensemble_on(device, kind):
    return PeftEnsembleModel(make(llama(), KINDS[kind]), NAMES, POSITIVE).to(device).eval()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_those_of_the_cpu(device, kind):
    here, there, batch = ensemble_on("cpu", kind), ensemble_on(device, kind), ensembles.prompts()
    moved = {name: value.to(device) for name, value in batch.items()}
    for combination in COMBINATIONS[:3]:
        here.combination = there.combination = combination
        expected = here(**batch, task=TASKS).logits
        for fused in (True, False):
            there.fused = fused
            found = there(**moved, task=TASKS).logits
            assert found.device.type == device and torch.allclose(found.cpu(), expected, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("combination", COMBINATIONS)
@torch.no_grad()
def test_texts_are_those_of_the_cpu(device, combination):
    here, there = ensemble_on("cpu", "ranks and scalings"), ensemble_on(device, "ranks and scalings")
    here.combination = there.combination = combination
    batch = ensembles.prompts()
    options = {"task": TASKS, "max_new_tokens": 6, "do_sample": False}
    expected = here.generate(**batch, **options)
    for beams in (1, 2):
        found = there.generate(**{name: value.to(device) for name, value in batch.items()}, num_beams=beams, **options)
        assert torch.equal(found.cpu(), expected if beams == 1 else here.generate(**batch, num_beams=2, **options))


def test_weights_that_all_rows_share_are_read_once(monkeypatch):
    def reads(num_layers):
        model = make(llama(num_hidden_layers=num_layers), KINDS["ranks and scalings"])
        ensemble = PeftEnsembleModel(model, NAMES, POSITIVE, combination="weights").eval()
        found = []
        with monkeypatch.context() as patch, torch.no_grad():
            for name in ("__float__", "item", "tolist"):
                own = getattr(torch.Tensor, name)
                patch.setattr(torch.Tensor, name, lambda value, own=own: found.append(value) or own(value))
            ensemble(**ensembles.prompts(), task="z")
        return len(found)

    # A layer that reads weights from a device waits for it.
    assert 0 < reads(1) == reads(3)
