"""A training that was resumed, and ends as one that was not interrupted."""

from typing import Any

import torch
from transformers.trainer_utils import TrainOutput

# Among the states of callbacks in a checkpoint's `trainer_state.json`.
_KEY = "hf_ensemble.training_loss"


class ResumedTrainingMixin:
    """Keeps the sum of the losses in checkpoints, and trains no step after the last.

    `Trainer` begins a new sum when it resumes: its mean is over the steps since the checkpoint, and the first logged
    loss lacks the steps between the last log and the checkpoint, as do the metrics that `SFTTrainer` logs. From the
    checkpoint of a last step that `max_steps` sets within an epoch it goes on to the next step. Over a single dataset a trainer stays as its parent is.
    """

    has_tasks: bool
    _resumed_loss: dict[str, Any] | None = None
    _is_ending: bool = False

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.has_tasks:
            self._keep_loss()
        super()._save_checkpoint(*args, **kwargs)

    def _keep_loss(self) -> None:
        since_log = self.accelerator.gather(self._tr_loss.detach().reshape(1)).tolist()
        self.state.stateful_callbacks[_KEY] = {
            "args": {},
            "attributes": {
                "total": self._total_loss_scalar,
                "since_log": since_log,
                "last_log": self._globalstep_last_logged,
                # Of `SFTTrainer`: metrics of the steps since the last log, and tokens so far.
                "metrics": {name: list(values) for name, values in self._train_metrics().items()},
                "tokens": getattr(self, "_total_train_tokens", 0),
            },
        }

    def _load_callback_state(self) -> None:
        # Called for the state of the checkpoint that is resumed from.
        self._resumed_loss = self.state.stateful_callbacks.pop(_KEY, None)
        super()._load_callback_state()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._restore_loss()
        if not self.has_tasks or self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _restore_loss(self) -> None:
        if self._resumed_loss is None:
            return
        loss, self._resumed_loss = self._resumed_loss["attributes"], None
        self._tr_loss = torch.tensor(loss["since_log"][self.args.process_index], device=self.args.device)
        self._total_loss_scalar = loss["total"]
        self._globalstep_last_logged = loss["last_log"]
        for name, values in loss["metrics"].items():
            self._train_metrics()[name].extend(values)
        if hasattr(self, "_total_train_tokens"):
            self._total_train_tokens = loss["tokens"]

    def _train_metrics(self) -> dict[str, list[float]]:
        return getattr(self, "_metrics", {}).get("train", {})

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._is_ending and "train_loss" in logs:
            logs["train_loss"] = self._mean_loss()
        super().log(logs, *args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if not self.has_tasks:
            return super()._finalize_training(*args, **kwargs)
        self._restore_loss()
        self._is_ending = True
        output = super()._finalize_training(*args, **kwargs)
        self._is_ending = False
        return output._replace(training_loss=self._mean_loss())

    def _mean_loss(self) -> float:
        return self._total_loss_scalar / max(self.state.global_step, 0.001)
