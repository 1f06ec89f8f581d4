"""Reports of a run's trainings to TensorBoard, Weights & Biases and other trackers, as of one training."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler, TrainerState

# Events at which trackers report figures by step. At others the step is part of a checkpoint's path.
_REPORTS = ("on_log", "on_evaluate", "on_predict")
# Trackers sort metrics by these first words.
_SPLITS = ("eval_", "test_")


def is_tracker(callback: TrainerCallback) -> bool:
    """Whether a callback is one of those that `report_to` names."""
    return isinstance(callback, tuple(INTEGRATION_TO_CALLBACK.values()))


def report_as_part_of_run(handler: CallbackHandler, name: str, first_step: int) -> None:
    """Let the trackers among a training's callbacks report it under its name, from a step on.

    Args:
        handler (`CallbackHandler`): of the training.
        name (`str`): of the training: `loss` is reported as `NAME/loss`, `eval_x` as `eval_NAME/x`.
        first_step (`int`): optimizer steps of the trainings before it.
    """
    handler.callbacks = [
        PartOfRun(callback, name, first_step) if is_tracker(callback) else callback for callback in handler.callbacks
    ]


@contextmanager
def tracked_run(trainer: Trainer) -> Iterator[None]:
    """While open, the trackers of a run's trainer are open too: those of its trainings then join them."""
    trackers = [callback for callback in trainer.callback_handler.callbacks if is_tracker(callback)]
    for tracker in trackers:
        tracker.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    try:
        yield
    finally:
        for tracker in trackers:
            tracker.on_train_end(
                trainer.args,
                trainer.state,
                trainer.control,
                model=trainer.model,
                processing_class=trainer.processing_class,
            )


class PartOfRun(TrainerCallback):
    """Passes a training's events on to a tracker, with the training's name before each metric and steps that go on.

    Args:
        tracker (`TrainerCallback`): the tracker.
        name (`str`): of the training.
        first_step (`int`): what is added to its steps.
    """

    def __init__(self, tracker: TrainerCallback, name: str, first_step: int):
        self.tracker = tracker
        self.name = name
        self.first_step = first_step

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
        return getattr(self.tracker, event)(args, state, control, **kwargs)

    return pass_on


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(PartOfRun, _event, _passed_on(_event))
