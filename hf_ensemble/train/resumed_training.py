"""A training that was resumed, and ends as one that was not interrupted."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerControl
from transformers.trainer_utils import TrainOutput

# Among the states of callbacks in a checkpoint's `trainer_state.json`.
_KEY = "hf_ensemble.training"


class ResumedTrainingMixin:
    """Keeps in checkpoints what `Trainer` forgets, so that a resumed training makes the same steps and logs.

    - The sum of the losses: `Trainer` begins a new one, so that its mean is over the steps since the checkpoint, and
      the first logged loss lacks the steps between the last log and the checkpoint. So do the metrics that
      `SFTTrainer` logs, which also counts tokens anew.
    - The end: from the checkpoint of a step that ended the training (`max_steps`, and early stopping where states of
      callbacks are restored) it goes on to the next step.
    - The end of an epoch: what is logged and evaluated there comes after the checkpoint of the epoch's last step.
    - The best checkpoint, where the folder has moved since.

    Over a single dataset a trainer stays as its parent is.
    """

    has_tasks: bool
    _resumed: dict[str, Any] | None = None
    _resumed_loss: dict[str, Any] | None = None
    _resumed_from: str | None = None
    _ignore_keys: list[str] | None = None
    _is_ending: bool = False
    # Of the last step: its number, whether its epoch has ended, its norm of the gradient and its learning rate.
    _last_step: tuple[int, bool, Any, float | None] = (0, False, None, None)

    def _inner_training_loop(self, *args: Any, ignore_keys_for_eval: list[str] | None = None, **kwargs: Any):
        self._ignore_keys, self._last_step = ignore_keys_for_eval, (0, False, None, None)
        return super()._inner_training_loop(*args, ignore_keys_for_eval=ignore_keys_for_eval, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args: Any, **kwargs: Any) -> None:
        # Called after each step, and once more when its epoch has ended.
        step = self.state.global_step
        self._last_step = (step, step == self._last_step[0], grad_norm, kwargs.get("learning_rate"))
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.has_tasks:
            self._keep_progress()
        super()._save_checkpoint(*args, **kwargs)

    def _keep_progress(self) -> None:
        since_log = self.accelerator.gather(self._tr_loss.detach().reshape(1)).tolist()
        _, has_ended, grad_norm, learning_rate = self._last_step
        self.state.stateful_callbacks[_KEY] = {
            "args": {},
            "attributes": {
                "total": self._total_loss_scalar,
                "since_log": since_log,
                "last_log": self._globalstep_last_logged,
                "is_stopped": self.control.should_training_stop,
                "epoch_has_ended": has_ended,
                "grad_norm": grad_norm.item() if isinstance(grad_norm, torch.Tensor) else grad_norm,
                "learning_rate": learning_rate,
                "metrics": {name: list(values) for name, values in self._train_metrics().items()},
                "tokens": getattr(self, "_total_train_tokens", 0),
            },
        }

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        *_, checkpoint, _ = args
        self._resumed_from = checkpoint
        trained = super()._init_training_state(*args)
        if self.has_tasks and checkpoint is not None:
            best = best_checkpoint_of(Path(checkpoint))
            self.state.best_model_checkpoint = str(best) if best is not None and best.is_dir() else None
        return trained

    def _load_callback_state(self) -> None:
        # Called for the state of the checkpoint that is resumed from.
        kept = self.state.stateful_callbacks.pop(_KEY, None)
        self._resumed = self._resumed_loss = None if kept is None else kept["attributes"]
        if not self.has_tasks:
            super()._load_callback_state()
        elif self.args.restore_callback_states_from_checkpoint:
            self._restore_callbacks()

    def _restore_callbacks(self) -> None:
        """Put the kept states into the callbacks; `Trainer` makes new ones, which may take other arguments."""
        states = {
            name: list(own) if isinstance(own, list) else [own] for name, own in self.state.stateful_callbacks.items()
        }
        for callback in self.callback_handler.callbacks:
            own = states.get(type(callback).__name__)
            if own and isinstance(callback, ExportableState) and not isinstance(callback, TrainerControl):
                vars(callback).update(own.pop(0)["attributes"])

    def _evaluate(self, *args: Any, skip_scheduler: bool = False) -> dict[str, float]:
        if skip_scheduler and self._resumed is not None:
            # `eval_on_start`: this is not the start.
            return {}
        return super()._evaluate(*args, skip_scheduler=skip_scheduler)

    def _run_epoch(self, **kwargs: Any) -> None:
        self._restore_loss()
        if self._finish_resumed_epoch(**{key: kwargs[key] for key in ("model", "trial", "epoch", "start_time")}):
            # The random state is already that of the checkpoint.
            kwargs["resume_from_checkpoint"] = None
        if self.has_tasks and (self.state.global_step >= self.state.max_steps or self._was_stopped()):
            self.control.should_training_stop = True
            return
        self._resumed = None
        super()._run_epoch(**kwargs)

    def _was_stopped(self) -> bool:
        restores = self.args.restore_callback_states_from_checkpoint
        return restores and self._resumed is not None and self._resumed["is_stopped"]

    def _finish_resumed_epoch(self, model, trial, epoch, start_time) -> bool:
        """Log, evaluate and save what came between the checkpoint and the next step; whether there was anything."""
        resumed = self._resumed
        if resumed is None or resumed["epoch_has_ended"]:
            return False
        if not (self._was_stopped() or float(self.state.epoch).is_integer()):
            return False
        resumed["epoch_has_ended"] = True
        self._load_rng_state(self._resumed_from)
        self._last_step = (self.state.global_step, False, None, None)
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        self._maybe_log_save_evaluate(
            self._tr_loss,
            resumed["grad_norm"],
            model,
            trial,
            epoch,
            self._ignore_keys,
            start_time,
            learning_rate=resumed["learning_rate"],
        )
        return True

    def _restore_loss(self) -> None:
        if self._resumed_loss is None:
            return
        loss, self._resumed_loss = self._resumed_loss, None
        self._tr_loss = torch.tensor(loss["since_log"][self.args.process_index], device=self.args.device)
        self._total_loss_scalar = loss["total"]
        self._globalstep_last_logged = loss["last_log"]
        for name, values in loss["metrics"].items():
            self._train_metrics()[name].extend(values)
        if hasattr(self, "_total_train_tokens"):
            self._total_train_tokens = loss["tokens"]

    def _train_metrics(self) -> dict[str, list[float]]:
        """Of `SFTTrainer`, since the last log."""
        return getattr(self, "_metrics", {}).get("train", {})

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._is_ending and "train_loss" in logs:
            logs["train_loss"] = self._mean_loss()
        super().log(logs, *args, **kwargs)

    def _finalize_training(self, trial, num_train_samples, start_time) -> TrainOutput:
        if not self.has_tasks:
            return super()._finalize_training(trial, num_train_samples, start_time)
        self._restore_loss()
        # Where no epoch was left to run.
        self._finish_resumed_epoch(self.model_wrapped, trial, self.state.epoch, start_time)
        self._resumed = None
        self._is_ending = True
        output = super()._finalize_training(trial, num_train_samples, start_time)
        self._is_ending = False
        return output._replace(training_loss=self._mean_loss())

    def _mean_loss(self) -> float:
        return self._total_loss_scalar / max(self.state.global_step, 0.001)

    def _load_best_model(self) -> None:
        if self.has_tasks and isinstance(self.model, PeftModel):
            # `Trainer` finds an adapter here only if it is named "default".
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()


def best_checkpoint_of(checkpoint: Path) -> Path | None:
    """The best checkpoint of a training until one of its checkpoints, beside which it lies."""
    state = checkpoint / TRAINER_STATE_NAME
    best = json.loads(state.read_text()).get("best_model_checkpoint") if state.is_file() else None
    return None if best is None else checkpoint.parent / Path(best).name
