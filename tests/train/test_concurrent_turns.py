"""Trainings take turns: which goes on when, what each of them keeps, and how all end."""

import contextvars
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import GradientState

from helpers import toy
from hf_ensemble.train.concurrent import turns
from hf_ensemble.train.concurrent.copies import sharing_frozen


def test_the_error_of_one_training_ends_all(tmp_path):
    begun, ended = [], []

    def job(name, turn):
        begun.append(name)
        try:
            if name == "fails":
                raise ValueError("of its own")
            turn.waits_for_backward = True
            turn._wait()
        except Exception:
            ended.append(f"{name} as an error")
            raise
        finally:
            ended.append(name)

    with pytest.raises(ValueError, match="of its own"):
        turns.Turns(2).run([partial(job, name) for name in ("waits", "fails", "never begins")])
    assert begun == ["waits", "fails"]
    assert ended == ["fails as an error", "fails", "waits"]


class Interrupted(threading.Semaphore):
    """Ctrl-C, while a training runs."""

    def __init__(self, begun):
        super().__init__(0)
        self.begun = begun

    def acquire(self, *args, **kwargs):
        begun, self.begun = self.begun, None
        if begun is None:
            return super().acquire(*args, **kwargs)
        begun.wait()
        raise KeyboardInterrupt


@pytest.mark.parametrize("shares", [True, False])
def test_an_interruption_ends_a_training_at_its_next_pass(shares):
    begun, passed = threading.Event(), []
    model = toy.with_lora(toy.llama()).train()
    all_turns = turns.Turns(1)
    all_turns.handed_back, all_turns.shares = Interrupted(begun), shares
    torch.manual_seed(3)
    before = torch.get_rng_state()
    GradientState()._set_sync_gradients(True)

    def job(turn):
        own = sharing_frozen(model)
        turn.share_backbone(own)
        torch.manual_seed(4)
        GradientState()._set_sync_gradients(False)
        begun.set()
        while not all_turns.is_abandoned:
            time.sleep(0.001)
        own(input_ids=torch.ones(1, 2, dtype=torch.long))
        passed.append(True)

    with pytest.raises(KeyboardInterrupt):
        all_turns.run([job])
    assert not passed
    # The process is as it was.
    assert torch.equal(torch.get_rng_state(), before) and GradientState().sync_gradients


def test_a_training_sees_what_is_open_where_it_was_begun():
    run = contextvars.ContextVar("run", default=None)
    run.set("open")
    assert turns.Turns(2).run([lambda turn: run.get()] * 2) == ["open", "open"]


def goes_forward(turn, masks="attention_mask", num_tokens=3):
    """As far as others see of it."""
    inputs = dict.fromkeys(("input_ids", masks), torch.ones(1, 3))
    turn.call = turns.BackboneCall(None, None, inputs, ("cpu", False, torch.float32))
    turn.num_tokens = num_tokens
    turn._wait()


def goes_backward(turn):
    if turn.passes:
        turn.waits_for_backward = True
        turn._wait()


def takes_steps(name, num_steps, num_forward, masks, events, turn):
    for _ in range(num_steps):
        for _ in range(num_forward):
            goes_forward(turn, masks)
            events.append(name)
        goes_backward(turn)


class Joint:
    def __init__(self, count, events):
        self.outputs, self._events = [True] * count, events

    def has_gradients(self, number):
        return False

    def backward(self):
        self._events.append("backward")


@pytest.fixture
def events(monkeypatch):
    """Names of trainings that have made a forward pass, and joint backward passes."""
    found = []

    monkeypatch.setattr(turns, "SharedPass", lambda calls: Joint(len(calls), found))
    return found


def test_trainings_with_unlike_calls_go_on_beside_each_other(events):
    masks = {"a": "attention_mask", "b": "attention_mask", "c": "position_ids"}
    turns.Turns(3).run([partial(takes_steps, name, 3, 1, own, events) for name, own in masks.items()])
    made = [name for name in events if name != "backward"]
    assert [sorted(made[start : start + 3]) for start in (0, 3, 6)] == [["a", "b", "c"]] * 3


def test_a_pass_goes_back_when_all_of_its_trainings_have(events):
    # One makes two forward passes before it goes backward.
    numbers = {"a": 1, "b": 2}
    turns.Turns(2).run([partial(takes_steps, name, 2, n, "attention_mask", events) for name, n in numbers.items()])
    assert events == ["a", "b", "b", "backward"] * 2


def test_each_training_draws_the_random_numbers_of_its_own_seed(monkeypatch):
    shared = []

    def draws_for_all(calls):
        shared.append(torch.rand(1).item())
        return Joint(len(calls), [])

    def draws(seed, turn):
        torch.manual_seed(seed)
        found = []
        for _ in range(2):
            goes_forward(turn)
            found.append(torch.rand(1).item())
            goes_backward(turn)
        return found

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(1, generator=generator).item() for _ in range(2)]

    monkeypatch.setattr(turns, "SharedPass", draws_for_all)
    assert turns.Turns(2, seed=5).run([partial(draws, 3), partial(draws, 4)]) == [drawn(3), drawn(4)]
    assert shared == drawn(5)


def test_the_seconds_of_shared_passes_are_shared_by_tokens(monkeypatch):
    now = 0.0

    def passes(seconds):
        nonlocal now
        now += seconds

    class Slow(Joint):
        def __init__(self, calls):
            super().__init__(len(calls), [])
            passes(4.0)

        def backward(self):
            passes(8.0)

    def takes_a_step(num_tokens, own_seconds, turn):
        goes_forward(turn, num_tokens=num_tokens)
        passes(own_seconds)
        goes_backward(turn)
        return turn.clock()

    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(turns, "SharedPass", Slow)
    # A quarter of 12 seconds and one of its own; three quarters and two.
    assert turns.Turns(2).run([partial(takes_a_step, 1, 1.0), partial(takes_a_step, 3, 2.0)]) == [4.0, 11.0]


def test_memory_that_runs_out_names_what_to_lower():
    def job(turn):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    with pytest.raises(torch.OutOfMemoryError) as found:
        turns.Turns(4).run([job])
    assert found.value.__notes__ == ["4 trainings run at once: lower concurrent_groups."]
