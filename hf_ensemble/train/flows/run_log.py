"""The trainings of a run as one: its log, its state and its figures."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers.trainer_callback import TrainerState

from ...runs import TrainedAdapter

# Key of a log's entry that names the training it is from.
TRAINING = "adapter"
# Entries that count from a training's begin.
_COUNTERS = ("epoch", "num_input_tokens_seen", "num_tokens")
_RATES = ("train_samples_per_second", "train_steps_per_second")
_SUMMED = ("step", "total_flos", "train_loss", "train_runtime", *_COUNTERS, *_RATES)


def plain_log(log: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries of a log as JSON values, whatever callbacks have put into them."""
    return json.loads(
        json.dumps(list(log), default=lambda value: value.tolist() if hasattr(value, "tolist") else repr(value))
    )


def joined_log(trainings: Sequence[TrainedAdapter]) -> list[dict[str, Any]]:
    """The logs of trainings, one after the other: steps, epochs and tokens go on, and `adapter` names the training."""
    log, counted = [], dict.fromkeys(_COUNTERS, 0)
    for training in trainings:
        entries = [{**entry, "step": entry.get("step", 0) + training.first_step} for entry in training.log_history]
        for entry in entries:
            entry.update({key: entry[key] + before for key, before in counted.items() if key in entry})
            log.append({**entry, TRAINING: training.name})
        for key in _COUNTERS:
            counted[key] = next((entry[key] for entry in reversed(entries) if key in entry), counted[key])
    return log


def follow(state: TrainerState, trainings: Sequence[TrainedAdapter]) -> None:
    """Let a state be that of all trainings; entries of its log that are from none of them stay, after the others."""
    if not trainings:
        return
    log = joined_log(trainings)
    state.global_step = max(training.first_step + training.global_step for training in trainings)
    state.max_steps = state.global_step
    state.total_flos = sum(training.total_flos for training in trainings)
    counted = {key: next((entry[key] for entry in reversed(log) if key in entry), 0) for key in _COUNTERS}
    state.epoch = counted["epoch"]
    state.num_train_epochs = math.ceil(state.epoch)
    state.num_input_tokens_seen = counted["num_input_tokens_seen"]
    state.log_history = [*log, *(entry for entry in state.log_history if TRAINING not in entry)]


def training_metrics(trainings: Sequence[TrainedAdapter]) -> dict[str, float]:
    """The figures that a trainer ends with, of all trainings together.

    `train_runtime` is the time of the trainings alone, `train_loss` the mean over all steps. Figures of a training that
    was resumed are of its last stretch, as in a plain `Trainer`.
    """
    ends = [(training, _last_entry(training)) for training in trainings]
    seconds = [end.get("train_runtime", training.seconds) for training, end in ends]
    metrics = {"train_runtime": round(sum(seconds), 4)}
    for key in _RATES:
        done = sum(own * end.get(key, 0.0) for own, (_, end) in zip(seconds, ends))
        metrics[key] = round(done / max(sum(seconds), 1e-9), 3)
    metrics["total_flos"] = sum(training.total_flos for training in trainings)
    losses = [math.nan if training.training_loss is None else training.training_loss for training in trainings]
    metrics["train_loss"] = _mean(losses, [training.global_step for training in trainings])
    others = dict.fromkeys(key for _, end in ends for key in end if key not in _SUMMED and "_mem_" not in key)
    for key in others:
        having = [(end[key], training.global_step) for training, end in ends if isinstance(end.get(key), int | float)]
        if having:
            metrics[key] = _mean(*zip(*having))
    return metrics


def _last_entry(training: TrainedAdapter) -> dict[str, Any]:
    return next((entry for entry in reversed(training.log_history) if "train_loss" in entry), {})


def _mean(values: Sequence[float], steps: Sequence[int]) -> float:
    # The same in any order of the trainings.
    return math.fsum(value * count for value, count in zip(values, steps)) / max(sum(steps), 1)
