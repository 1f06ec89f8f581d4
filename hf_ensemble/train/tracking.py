"""Reports of a run's trainings to TensorBoard, Weights & Biases and other trackers, as of one training."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler, TrainerState

# Events at which trackers report figures by step. At others the step is part of a checkpoint's path.
_REPORTS = ("on_log", "on_evaluate", "on_predict")
_ENDS = ("on_train_begin", "on_train_end")
# Trackers sort metrics by these first words.
_SPLITS = ("eval_", "test_")
# Trackers with one run for the whole process, which the end of any training closes.
_OF_A_PROCESS = ("trackio", "clearml")
# Trackers that close nothing at a training's end, but upload what was trained: not after an error.
_UPLOADING = ("wandb", "comet_ml", "dagshub")
# Trackers of the run that is open.
_open: list[TrainerCallback] = []


def is_tracker(callback: TrainerCallback) -> bool:
    """Whether a callback is one of those that `report_to` names."""
    return _is_any(callback, list(INTEGRATION_TO_CALLBACK))


def _is_any(callback: TrainerCallback, names: Sequence[str]) -> bool:
    known = INTEGRATION_TO_CALLBACK
    return isinstance(callback, tuple(known[name] for name in names if name in known))


def report_as_part_of_run(handler: CallbackHandler, name: str, first_step: int) -> None:
    """Let the trackers among a training's callbacks report it under its name, from a step on.

    Args:
        handler (`CallbackHandler`): of the training.
        name (`str`): of the training: `loss` is reported as `NAME/loss`, `eval_x` as `eval_NAME/x`.
        first_step (`int`): optimizer steps of the trainings before it.
    """
    handler.callbacks = [
        _part_of_run(callback, name, first_step) if is_tracker(callback) else callback for callback in handler.callbacks
    ]


def _part_of_run(tracker: TrainerCallback, name: str, first_step: int) -> "PartOfRun":
    is_of_process = _is_any(tracker, _OF_A_PROCESS)
    shared = [own for own in _open if own is tracker or (is_of_process and type(own) is type(tracker))]
    return PartOfRun(shared[0] if shared else tracker, name, first_step, bool(shared))


@contextmanager
def tracked_run(trainer: Trainer) -> Iterator[None]:
    """While open, the trackers of a run's trainer are open too: those of its trainings then join them.

    Each of them is closed once, also after an error.
    """
    with ExitStack() as stack:
        stack.callback(_open.clear)
        for tracker in [callback for callback in trainer.callback_handler.callbacks if is_tracker(callback)]:
            tracker.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
            stack.push(partial(_close, tracker, trainer))
            _open.append(tracker)
        yield


@contextmanager
def closed_after_error(trainer: Trainer) -> Iterator[None]:
    """While open, a training runs whose trackers are closed if it ends with an error, as they are at its end."""
    with ExitStack() as stack:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, PartOfRun):
                stack.push(partial(_close, callback, trainer))
        yield


def _close(callback: TrainerCallback, trainer: Trainer, kind: type[BaseException] | None = None, *error: Any) -> None:
    is_part = isinstance(callback, PartOfRun)
    tracker = callback.tracker if is_part else callback
    if (is_part and not callback.is_open) or (kind is not None and _is_any(tracker, _UPLOADING)):
        return
    callback.on_train_end(
        trainer.args, trainer.state, trainer.control, model=trainer.model, processing_class=trainer.processing_class
    )


class PartOfRun(TrainerCallback):
    """Passes a training's events on to a tracker, with the training's name before each metric and steps that go on.

    Args:
        tracker (`TrainerCallback`): the tracker.
        name (`str`): of the training.
        first_step (`int`): what is added to its steps.
        is_shared (`bool`): whether it is the run's own, which opens and closes it.

    Attributes:
        is_open (`bool`): whether the training has begun and not ended.
    """

    def __init__(self, tracker: TrainerCallback, name: str, first_step: int, is_shared: bool):
        self.tracker = tracker
        self.name = name
        self.first_step = first_step
        self.is_shared = is_shared
        self.is_open = False

    def _named(self, metrics: dict[str, Any]) -> dict[str, Any]:
        named = {}
        for key, value in metrics.items():
            split = next((split for split in _SPLITS if key.startswith(split)), "")
            named[f"{split}{self.name}/{key.removeprefix(split)}"] = value
        return named

    def _counted_on(self, state: TrainerState) -> TrainerState:
        state = copy.copy(state)
        state.global_step += self.first_step
        state.max_steps += self.first_step
        return state


def _passed_on(event: str):
    def pass_on(self: PartOfRun, args, state, control, **kwargs: Any):
        if event in _REPORTS:
            state = self._counted_on(state)
            kwargs |= {key: self._named(kwargs[key]) for key in ("logs", "metrics") if kwargs.get(key)}
        if event in _ENDS:
            self.is_open = event == _ENDS[0]
            if self.is_shared:
                return None
        return getattr(self.tracker, event)(args, state, control, **kwargs)

    return pass_on


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(PartOfRun, _event, _passed_on(_event))
