"""How many trainings are run at once, by the seconds of their passes."""

import pytest
import torch

from hf_ensemble.errors import ConfigurationError
from hf_ensemble.train.concurrent import choice
from hf_ensemble.train.concurrent.choice import chosen_concurrency

NAMES = ["a", "b", "c", "d", "e"]


def measuring(speed_ups, spread=0.0):
    """What measures passes of a second each; and the numbers of trainings that it has measured."""
    tried = []

    def round_seconds(names):
        tried.append(len(names))
        speed_up = 1.0 if len(names) == 1 else speed_ups[len(names)]
        if isinstance(speed_up, Exception):
            raise speed_up
        middle = len(names) / speed_up
        return [middle, (1 + spread) * middle, middle, (1 - spread) * middle]

    return round_seconds, tried


@pytest.mark.parametrize(
    ("speed_ups", "expected", "numbers"),
    [
        pytest.param({2: 1.9, 4: 3.5, 5: 4.2}, 5, [2, 4, 5], id="all gain"),
        pytest.param({2: 1.9, 4: 2.5, 5: 2.6}, 4, [2, 4, 5], id="the last gains less than 5 %"),
        pytest.param({2: 1.3, 4: 1.3}, 2, [2, 4], id="more do not gain"),
        pytest.param({2: 1.04}, 1, [2], id="none gain 5 %"),
        pytest.param({2: 0.8}, 1, [2], id="slower"),
    ],
)
def test_twice_as_many_are_tried_as_long_as_that_gains(speed_ups, expected, numbers):
    measure, tried = measuring(speed_ups)
    found = chosen_concurrency(NAMES, measure)
    assert found.num_at_once == expected and [trial.num_at_once for trial in found.trials] == numbers
    # Each by itself once.
    assert [count for count in tried if count > 1] == numbers and tried.count(1) == numbers[-1]
    for trial in found.trials:
        assert trial.speed_up == pytest.approx(speed_ups[trial.num_at_once])
        assert trial.seconds_alone == [trial.num_at_once] * 4
        assert f"{trial.num_at_once} at once are {trial.speed_up:.2f} times as fast" in found.reason
    assert found.reason.endswith("to count") == (expected != numbers[-1])


def test_a_gain_within_the_spread_of_the_rounds_does_not_count():
    assert chosen_concurrency(NAMES[:2], measuring({2: 1.2}, spread=0.08)[0]).num_at_once == 2
    found = chosen_concurrency(NAMES[:2], measuring({2: 1.2}, spread=0.2)[0])
    assert found.num_at_once == 1 and found.trials[0].speed_up == pytest.approx(1.2)


@pytest.mark.parametrize(("speed_ups", "expected"), [({2: 1.9}, 2), ({}, 1)])
def test_as_many_are_run_as_fit_into_memory(speed_ups, expected, monkeypatch):
    full, cleared = torch.OutOfMemoryError("CUDA out of memory."), []
    monkeypatch.setattr(choice, "clear_device_cache", lambda garbage_collection: cleared.append(True))
    measure, tried = measuring({2: full, 4: full, **speed_ups})
    found = chosen_concurrency(NAMES, measure)
    assert found.num_at_once == expected and max(tried) == 2 * expected and cleared
    assert found.reason.endswith(f"{2 * expected} at once do not fit into memory")


def test_trainings_that_cannot_share_passes_say_why_and_other_errors_are_raised():
    found = chosen_concurrency(NAMES, measuring({2: 1.9, 4: ConfigurationError("Expected backward.")})[0])
    assert (found.num_at_once, found.reason, found.trials) == (1, "Expected backward.", [])
    with pytest.raises(RuntimeError, match="of its own"):
        chosen_concurrency(NAMES, measuring({2: RuntimeError("of its own")})[0])
