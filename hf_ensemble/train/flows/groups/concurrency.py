"""How many groups are trained at once where a run finds that out itself, before they are trained."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from ...._processes import is_main_process, run_on_main
from ....runs import Concurrency, TrainedAdapter
from ...concurrent.choice import chosen_concurrency
from ...configs import AUTO
from ...inputs.concurrency import obstacle_of_arguments, obstacle_of_model
from ..adapter_training import AdapterTraining, rows_of, run_concurrently
from ..context import FlowContext
from ..stages import announce

# Rounds that are timed, after a first one that is not.
_ROUNDS = 4
# Passes that a group's training has to have: ten times those that are made until all numbers have been tried, at most.
_LEAST_PASSES = 10 * 4 * (_ROUNDS + 2)
# What a training is begun without that is left before its first optimizer step.
_WITHOUT = {
    "eval_on_start": False,
    "skip_memory_metrics": True,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": None,
    "dataloader_persistent_workers": False,
}


class _MeasuredError(BaseException):
    """Ends a training that was begun to be timed; no `Exception`, so that nothing takes it for its own."""


def groups_at_once(training: AdapterTraining, mixtures: Mapping[str, Mapping[str, float]], num_passes: int) -> int:
    """How many groups to train at once: as many as the arguments say, or with `"auto"` as many as gain by it.

    That is measured once in a run and recorded. Nothing is left of it but the record: passes are made by copies of the
    model, no optimizer steps, and random states are put back.

    Args:
        training (`AdapterTraining`): of the model, which stays at theta0.
        mixtures (`dict[str, dict[str, float]]`): the groups that are to be trained.
        num_passes (`int`): batches of all these trainings.
    """
    context, run = training.context, training.context.run
    asked = context.args.concurrent_groups
    if asked != AUTO:
        return asked
    if len(mixtures) < 2:
        return 1
    obstacle = obstacle_of_arguments(context.args) or obstacle_of_model(context.model, context.args)
    if obstacle is not None:
        _tell(context, Concurrency(1, f"training several at once does not go with {obstacle}"))
        return 1
    known = run_on_main(lambda: run.read(Concurrency) if run.has(Concurrency) else None)
    if known is None:
        known = _measured(training, mixtures, num_passes)
        _record(context, known)
    return known.num_at_once


def lower_concurrency(context: FlowContext, num_at_once: int) -> None:
    """Let the run train half as many groups at once from now on as memory has run out with."""
    known = run_on_main(lambda: context.run.read(Concurrency))
    reason = f"memory ran out in trainings of {num_at_once} at once"
    _record(context, replace(known, num_at_once=num_at_once // 2, reason=reason))


def _record(context: FlowContext, chosen: Concurrency) -> None:
    if is_main_process():
        context.run.write(chosen)
    _tell(context, chosen)


def _tell(context: FlowContext, chosen: Concurrency) -> None:
    groups = "one group after the other" if chosen.num_at_once == 1 else f"{chosen.num_at_once} groups at once"
    announce(f"Training {groups}: {chosen.reason}", with_bars=not context.args.disable_tqdm)


def _measured(training: AdapterTraining, mixtures: Mapping[str, Mapping[str, float]], num_passes: int) -> Concurrency:
    if num_passes < _LEAST_PASSES * len(mixtures):
        return Concurrency(1, "trainings are too short for measuring what is faster to pay")
    return chosen_concurrency(list(mixtures), partial(_round_seconds, training, mixtures))


def _round_seconds(
    training: AdapterTraining, mixtures: Mapping[str, Mapping[str, float]], names: Sequence[str]
) -> list[float]:
    """Seconds of rounds in each of which these groups' first batches go forward and backward, at once."""
    begun: list[float] = []

    def job(name: str, own: AdapterTraining) -> None:
        known = TrainedAdapter(name, dict(mixtures[name]), own.context.args.seed, "")
        trainer = own.make_trainer(known, rows_of(own.context.train_rows, mixtures[name]), **_WITHOUT)
        # Nobody is told of a training that does not take place.
        trainer.callback_handler.callbacks = []
        trainer.counts_usage = False
        # Trainings that take turns begin each pass in turn, so that one of them sees how long all take.
        see = partial(_note_time, own.context, begun) if name == names[0] else lambda: None
        trainer.training_step = partial(_make_rounds, trainer.training_step, see)
        try:
            trainer.train()
        except _MeasuredError:
            pass
        finally:
            trainer.accelerator.free_memory()

    run_concurrently(training, [partial(job, name) for name in names], len(names))
    return [end - begin for begin, end in zip(begun[1:], begun[2:])]


def _make_rounds(
    step: Callable[..., Any], see: Callable[[], None], model: nn.Module, inputs: Mapping[str, Any], *args: Any
) -> NoReturn:
    """Repeat the first pass of a training, in place of going on to its optimizer's step."""
    for _ in range(_ROUNDS + 2):
        see()
        step(model, copy.copy(inputs), *args)
    raise _MeasuredError


def _note_time(context: FlowContext, times: list[float]) -> None:
    if context.args.device.type != "cpu":
        # What was begun there has to end first.
        torch.accelerator.synchronize()
    times.append(time.perf_counter())
