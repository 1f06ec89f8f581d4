"""Trainings that take turns, so that their passes through the base model can be made at once."""

import contextvars
import functools
import inspect
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from peft import PeftModel
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import Trainer, set_seed

from ..._clock import count_by
from ...ensemble.forward.adapter_layers import CannotFuseError
from ...errors import ConfigurationError
from ...logging import get_logger
from .process_state import ProcessState
from .shared_pass import BackboneCall, SharedPass, can_share, hooked_part

logger = get_logger(__name__)

T = TypeVar("T")


class _AbandonedError(BaseException):
    """Ends a training because another one has failed; no `Exception`, so that nothing takes it for its own."""


class Turn:
    """One of several trainings that take turns.

    A training runs alone until it calls the backbone of its model with gradients, or has gone backward to there. Then
    it waits until all others wait too.

    Args:
        job (`Callable[[Turn], Any]`): the training; is passed this object.
        turns (`Turns`): of all of them.
    """

    def __init__(self, job: Callable[["Turn"], Any], turns: "Turns"):
        self.result: Any = None
        self.error: BaseException | None = None
        self.is_done = False
        self.call: BackboneCall | None = None
        self.output: Any = None
        self.waits_for_backward = False
        self.passes: list[tuple[SharedPass, int]] = []
        # Those of its step whose gradients have been taken through the base.
        self.gone_back: list[tuple[SharedPass, int]] = []
        # Of its last call, padding included.
        self.num_tokens = 0
        self._job: Callable[[Turn], Any] | None = job
        self._turns = turns
        self._go = threading.Semaphore(0)
        self._state = ProcessState()
        self._seconds, self._since = 0.0, None
        # What is open for this thread, such as a tracker's run, is open for the training.
        run = contextvars.copy_context().run
        threading.Thread(target=run, args=(self._run,), name="training", daemon=True).start()

    @property
    def is_waiting(self) -> bool:
        return self.call is not None or self.waits_for_backward

    def clock(self) -> float:
        """Seconds that this training has taken: its own, and its rows' share of passes that were shared."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def add_seconds(self, seconds: float) -> None:
        self._seconds += seconds

    def share_backbone(self, model: PeftModel) -> None:
        """Let the passes of a model's backbone in training be shared with other trainings."""
        backbone = model.get_base_model().base_model
        plain = backbone.forward
        names = list(inspect.signature(plain).parameters)

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._turns.is_abandoned:
                raise _AbandonedError
            inputs = {name: value for name, value in (dict(zip(names, args)) | kwargs).items() if value is not None}
            # For losses, which are computed above the backbone.
            inputs.pop("num_items_in_batch", None)
            # Operations are counted by training, in passes of its own.
            is_counted = _get_current_dispatch_mode() is not None
            is_trained = backbone.training and torch.is_grad_enabled()
            if not is_trained or is_counted or "input_ids" not in inputs or not self._turns.shares:
                return plain(*args, **kwargs)
            hooked = hooked_part(backbone)
            if hooked is not None:
                self._turns.stop_sharing(f"{hooked} has a hook, which would be called for the rows of all or for none.")
                return plain(*args, **kwargs)
            self._check_went_backward()
            kind = inputs["input_ids"].device.type
            autocast = (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            self.call = BackboneCall(backbone, plain, inputs, autocast)
            self.num_tokens = inputs["input_ids"].numel()
            self._wait()
            output, self.output = self.output, None
            return plain(*args, **kwargs) if output is None else output

        backbone.forward = forward

    def share_backward(self, trainer: Trainer) -> None:
        """Let the backward passes of a trainer be shared with other trainings."""
        plain, step = trainer.accelerator.backward, trainer.training_step

        def backward(loss: torch.Tensor, **kwargs: Any) -> None:
            plain(loss, **kwargs)
            if self.passes:
                self.waits_for_backward = True
                self._wait()

        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss = step(*args, **kwargs)
            # Before the optimizer steps.
            self._check_went_backward()
            self.gone_back = []
            return loss

        trainer.accelerator.backward, trainer.training_step = backward, training_step

    def _check_went_backward(self) -> None:
        """Refuse a loss whose gradients did not reach the adapter."""
        if any(own.has_gradients(number) for own, number in self.passes):
            raise ConfigurationError(
                "Expected self.accelerator.backward(loss) in the trainer's training_step, found loss.backward(), "
                "which trainings that share passes cannot wait for. Call the former, or set concurrent_groups=1."
            )
        if any(own.has_gradients(number) for own, number in self.gone_back):
            raise ConfigurationError(
                "Expected one backward pass after the forward passes in the trainer's training_step, found another one "
                "to where they had gone back already: trainings that share passes take gradients through the base "
                "once. Add up the losses and call self.accelerator.backward on their sum, or set concurrent_groups=1."
            )

    def resume(self) -> None:
        """Run the training until it waits or ends; called by the thread of all."""
        own = ProcessState()
        self._state.restore()
        self._since = time.perf_counter()
        self._go.release()
        try:
            self._turns.handed_back.acquire()
        finally:
            self._seconds, self._since = self.clock(), None
            self._state = ProcessState()
            own.restore()

    def _wait(self) -> None:
        self._turns.handed_back.release()
        self._go.acquire()
        if self._turns.is_abandoned:
            raise _AbandonedError

    def _run(self) -> None:
        self._go.acquire()
        count_by(self.clock)
        try:
            if not self._turns.is_abandoned:
                self.result = self._job(self)
                self._check_went_backward()
        except BaseException as error:
            self.error = error
        finally:
            # Its model and its trainer are not needed any more.
            self.is_done, self._job, self.passes, self.gone_back = True, None, [], []
            self._turns.handed_back.release()


class Turns:
    """Runs trainings in turns, up to a number of them at once.

    Args:
        num_at_once (`int`): trainings that are begun and not ended, at most.
        seed (`int`): of the random numbers in passes that are shared, those of dropout.
    """

    def __init__(self, num_at_once: int, seed: int = 0):
        self.num_at_once = num_at_once
        self.seed = seed
        self.handed_back = threading.Semaphore(0)
        self.is_abandoned = False
        # Until a pass has turned out not to be one of rows alone.
        self.shares = True

    def run(self, jobs: Sequence[Callable[[Turn], T]]) -> list[T]:
        """Run trainings to their ends; where one fails, the others end where they are, and its error is raised."""
        turns: list[Turn] = []
        before = ProcessState()
        try:
            set_seed(self.seed)
            while len(turns) < len(jobs) or any(not own.is_done for own in turns):
                open_turns = [own for own in turns if not own.is_done]
                while len(turns) < len(jobs) and len(open_turns) < self.num_at_once:
                    turns.append(Turn(jobs[len(turns)], self))
                    open_turns.append(turns[-1])
                for own in open_turns:
                    if not own.is_waiting:
                        own.resume()
                        if own.error is not None:
                            raise own.error
                if all(own.is_waiting for own in open_turns):
                    self._serve(open_turns)
        except Exception as error:
            if should_reduce_batch_size(error):
                error.add_note(f"{self.num_at_once} trainings run at once: lower concurrent_groups.")
            raise
        finally:
            try:
                self._abandon(turns)
            finally:
                before.restore()
        return [own.result for own in turns]

    def stop_sharing(self, reason: str) -> None:
        """From now on each training runs the base itself."""
        logger.warning("Trainings run at once without sharing passes through the base model: %s", reason)
        self.shares = False

    def _abandon(self, turns: Sequence[Turn]) -> None:
        """End the trainings that have not ended."""
        self.is_abandoned = True
        for own in turns:
            while not own.is_done:
                own.resume()

    def _serve(self, turns: Sequence[Turn]) -> None:
        """Make the passes that trainings wait for: back where all rows of a pass have gone backward, else forward.

        Trainings whose calls are unlike the others' then make as many passes as these.
        """
        calling = [own for own in turns if own.call is not None]
        unfinished = {shared for own in calling for shared, _ in own.passes}
        finished = dict.fromkeys(shared for own in turns for shared, _ in own.passes if shared not in unfinished)
        served = [own for own in turns if any(shared in finished for shared, _ in own.passes)] or calling
        begun = time.perf_counter()
        if finished:
            for shared in finished:
                shared.backward()
        else:
            self._forward(calling)
        seconds = time.perf_counter() - begun
        total = sum(own.num_tokens for own in served)
        for own in served:
            own.add_seconds(seconds * own.num_tokens / total)
            if finished:
                own.gone_back += [(shared, number) for shared, number in own.passes if shared in finished]
                own.passes = [(shared, number) for shared, number in own.passes if shared not in finished]
                own.waits_for_backward = bool(own.passes)
            else:
                own.call = None

    def _forward(self, calling: Sequence[Turn]) -> None:
        """Share a pass among the calls that can; each of the others is made by its own training."""
        left = list(calling)
        while left:
            alike = [left[0], *(own for own in left[1:] if can_share([left[0].call, own.call]))]
            left = [own for own in left if own not in alike]
            if len(alike) == 1:
                continue
            try:
                shared = SharedPass([own.call for own in alike])
            except CannotFuseError as error:
                self.stop_sharing(str(error))
                return
            for number, own in enumerate(alike):
                own.output = shared.outputs[number]
                own.passes.append((shared, number))


def backbone_of(model: PeftModel) -> nn.Module | None:
    """The part of a model below its head, which several trainings can share; `None` where it has none."""
    base = model.get_base_model()
    backbone = getattr(base, "base_model", None)
    return None if backbone is base else backbone
