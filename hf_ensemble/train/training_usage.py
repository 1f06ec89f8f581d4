"""What a training takes: floating point operations, tokens and time."""

import time
from dataclasses import asdict
from typing import Any

import torch
from transformers.trainer_utils import TrainOutput

from .._clock import is_wall_time, work_seconds
from .._processes import run_on_all
from ..models.usage import FlopSamples, Usage, UsageCounter

# Among the states of callbacks in a checkpoint's `trainer_state.json`.
_KEY = "hf_ensemble.usage"


class TrainingUsageMixin:
    """Counts the operations and tokens of a training's forward and backward passes, and of its evaluations beside.

    What was counted until a checkpoint is kept in it: a resumed training ends with the figures of one that was not
    interrupted, but for its time, which lacks what was lost with the killed process.

    Attributes:
        usage_samples (`FlopSamples`): what is known of this training's batches.
        counts_usage (`bool`): whether to count.
        training_usage (`list[Usage]`, *optional*): what the training took on each process, without its evaluations;
            there once it is over.
    """

    has_tasks: bool
    usage_samples: FlopSamples | None = None
    counts_usage: bool = True
    training_usage: list[Usage] | None = None
    _usage: UsageCounter | None = None
    _evaluation_usage: UsageCounter | None = None
    _began: float = 0.0

    def _inner_training_loop(self, *args: Any, **kwargs: Any):
        if not (self.has_tasks and self.counts_usage):
            return super()._inner_training_loop(*args, **kwargs)
        self._began = work_seconds()
        is_compiled = bool(self.args.torch_compile)
        with UsageCounter(self.usage_samples, is_compiled) as self._usage, UsageCounter() as self._evaluation_usage:
            output = super()._inner_training_loop(*args, **kwargs)
            self.training_usage = run_on_all(self._so_far)
        self._usage = self._evaluation_usage = None
        return output

    def _so_far(self) -> Usage:
        usage = self._usage.total()
        usage.seconds += work_seconds() - self._began
        return usage

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> TrainOutput:
        if not is_wall_time():
            start_time = time.time() - (work_seconds() - self._began)
        return super()._finalize_training(trial, num_train_samples, start_time)

    def training_step(self, model, inputs, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._usage is None:
            return super().training_step(model, inputs, *args, **kwargs)
        with self._usage.batch(inputs):
            return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model, inputs, *args: Any, **kwargs: Any):
        if self._evaluation_usage is None:
            return super().prediction_step(model, inputs, *args, **kwargs)
        with self._evaluation_usage.batch(inputs):
            return super().prediction_step(model, inputs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self._usage is not None:
            usage = [asdict(own) for own in run_on_all(self._so_far)]
            self.state.stateful_callbacks[_KEY] = {"args": {}, "attributes": {"usage": usage}}
        super()._save_checkpoint(*args, **kwargs)

    def _load_callback_state(self) -> None:
        # Called for the state of the checkpoint that is resumed from.
        kept = self.state.stateful_callbacks.pop(_KEY, {"attributes": {"usage": []}})["attributes"]["usage"]
        if len(kept) == self.args.world_size:
            self._usage.resume(Usage(**kept[self.args.process_index]))
        super()._load_callback_state()


def usage_fields(parts: list[Usage]) -> dict[str, Any]:
    """The fields of a training's record that say what it took, from what each process took."""
    return {
        "flops": float(sum(own.flops for own in parts)),
        "tokens": sum(own.tokens for own in parts),
        "padding": sum(own.padding for own in parts),
        "seconds": round(max(own.seconds for own in parts), 3),
    }
