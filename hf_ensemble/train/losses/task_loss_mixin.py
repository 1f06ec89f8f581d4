"""A trainer that logs each task's loss, and weighs them where it is asked to."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..._processes import run_on_all
from ...errors import ConfigurationError
from ...models.kinds import shifts_labels
from ...tasks import TASK
from ...tasks.columns import ROW_LENGTHS
from .balance import TaskBalance
from .by_task import TaskLosses, counted, owners, spread, sums_by_task
from .step_loss import StepLoss

# Among the states of callbacks in a checkpoint's `trainer_state.json`.
_KEY = "hf_ensemble.task_losses"


class TaskLossMixin:
    """Logs `loss_TASK` beside `loss`, and averages a step's loss over tasks with another `task_loss_weighting`.

    Each task's loss is read off the outputs of the forward pass that the step's loss is computed from; the step's loss
    itself is the parent's, unless it is weighted. With a loss of the user's own (`compute_loss_func`) or label
    smoothing the outputs do not say what a token adds to it, so that there is no loss by task.
    """

    has_tasks: bool
    sampling_weights: dict[str, float]
    batch_tasks: list[str]
    batch_ids: list[str]
    batch_row_lengths: list[int] | None = None
    # In place of the loss of each token.
    step_loss: StepLoss | None = None
    _num_counted: int = 0
    _task_losses: TaskLosses | None = None
    _balance: TaskBalance | None = None
    _coefficients: torch.Tensor | None = None
    _is_weighted: bool = False

    def __init__(self, *args: Any, **kwargs: Any):
        self._has_own_loss = kwargs.get("compute_loss_func") is not None
        super().__init__(*args, **kwargs)
        self._has_own_loss |= self.args.label_smoothing_factor > 0
        self.shifts_labels = shifts_labels(self.model)
        if self._loss_weighting() != "tokens":
            # Weighted losses are averaged over the whole step.
            self.loss_is_scaled_for_ga = True

    def _loss_weighting(self) -> str:
        return getattr(self.args, "task_loss_weighting", "tokens") if self.has_tasks else "tokens"

    def _token_losses(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor | None:
        """Loss of each token or row of a batch `(B, T)`, 0 where there is no label; `None` if the outputs lack it."""
        raise NotImplementedError

    def _auxiliary_loss(self, outputs: Any) -> torch.Tensor | float:
        """What the parent adds to the tokens' loss."""
        return 0.0

    def _inner_training_loop(self, *args: Any, **kwargs: Any):
        if self.has_tasks:
            names = [task for task, weight in self.sampling_weights.items() if weight > 0]
            names = names or self.train_dataset.unique(TASK)
            weighting = self._loss_weighting()
            self._task_losses = TaskLosses(names, self.args.device)
            if weighting != "tokens":
                self._balance = TaskBalance(names, self.args.coba_window if weighting == "convergence" else None)
        return super()._inner_training_loop(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any):
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if self._balance is not None:
            self._coefficients = self._balance.coefficients(self._counts(batches))
        if self.step_loss is not None:
            masks = [counted(batch["labels"], self.shifts_labels) for batch in batches]
            self._num_counted = max(sum(int(mask.sum()) for mask in masks), 1)
        return batches, num_items

    def _counts(self, batches: Sequence[dict[str, Any]]) -> torch.Tensor:
        """Tokens of each task that the step's loss is averaged over."""
        counts = torch.zeros(len(self._balance.names), dtype=torch.long, device=self.args.device)
        for batch in batches:
            if TASK in batch and "labels" in batch:
                mask = counted(batch["labels"], self.shifts_labels).to(counts.device)
                owner = self._owners(batch["labels"], batch[TASK], batch.get(ROW_LENGTHS)).to(counts.device)
                counts += sums_by_task(mask.long(), owner, len(counts))
        return self.accelerator.reduce(counts, "sum") if self._averages_over_processes() else counts

    def _averages_over_processes(self) -> bool:
        return self.args.average_tokens_across_devices and self.args.world_size > 1

    def _owners(self, labels: torch.Tensor, tasks: Sequence[str], row_lengths: Sequence[int] | None) -> torch.Tensor:
        return owners(tasks, {name: index for index, name in enumerate(self._task_losses.names)}, labels, row_lengths)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._is_weighted = False
        loss = super().training_step(*args, **kwargs)
        if (self._balance is not None or self.step_loss is not None) and not self._is_weighted:
            name = "task_loss_weighting" if self.step_loss is None else "boosting_method"
            raise ConfigurationError(
                f"{name}={getattr(self.args, name)!r} changes the losses of tokens, which "
                f"{type(self).__name__}.compute_loss does not give. Call super().compute_loss(...) there, or leave "
                f"{name} out."
            )
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args, **kwargs):
        labels = inputs.get("labels")
        is_known = self._task_losses is not None and self.batch_tasks and not self._has_own_loss
        if not (is_known and self.model.training and labels is not None):
            return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        tasks, ids, row_lengths = self.batch_tasks, self.batch_ids, self.batch_row_lengths
        with _outputs_of(model) as seen:
            result = super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        with torch.set_grad_enabled(self._balance is not None or self.step_loss is not None):
            losses = self._token_losses(seen[-1], labels) if seen else None
        if losses is None:
            return result
        owner = self._owners(labels, tasks, row_lengths)
        self._task_losses.add(losses, counted(labels, self.shifts_labels), owner, not self.args.logging_nan_inf_filter)
        if self.step_loss is not None:
            loss = self.step_loss.of_tokens(losses, labels, tasks, ids).sum() / self._num_counted
            self._is_weighted = True
            return (loss, result[1]) if return_outputs else loss
        if self._balance is None:
            return result
        loss = (spread(self._coefficients, owner, losses.shape) * losses).sum()
        if self._averages_over_processes():
            # DDP averages gradients over processes.
            loss = loss * self.accelerator.num_processes
        loss = loss + self._auxiliary_loss(seen[-1])
        self._is_weighted = True
        return (loss, result[1]) if return_outputs else loss

    def _evaluate(self, *args: Any, skip_scheduler: bool = False, **kwargs: Any) -> dict[str, float]:
        metrics = super()._evaluate(*args, skip_scheduler=skip_scheduler, **kwargs)
        # With `eval_on_start` a resumed training makes an evaluation that it would not make without the interruption.
        is_extra = skip_scheduler and self.state.global_step > 0
        if self._balance is not None and self._balance.window is not None and not is_extra:
            losses = {name: metrics[f"eval_{name}_loss"] for name in self._balance.names}
            self._balance.observe(self.state.global_step, losses)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._task_losses is not None and self.is_in_train and "loss" in logs:
            logs |= self._task_logs()
        super().log(logs, *args, **kwargs)

    def _task_logs(self) -> dict[str, float]:
        """Mean loss of each task since the last log, over all processes, and the weights that change."""
        own = self._task_losses
        sums, counts = (self.accelerator.reduce(values, "sum").tolist() for values in (own.sums, own.counts))
        own.clear()
        logs = {f"loss_{name}": total / count for name, total, count in zip(own.names, sums, counts) if count}
        if self._balance is not None and self._balance.window is not None:
            logs |= {f"loss_weight_{name}": weight for name, weight in zip(own.names, self._balance.weights)}
        return logs

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self._task_losses is not None:
            attributes = {"losses": run_on_all(self._task_losses.state)}
            if self._balance is not None:
                attributes["balance"] = self._balance.state()
            self.state.stateful_callbacks[_KEY] = {"args": {}, "attributes": attributes}
        super()._save_checkpoint(*args, **kwargs)

    def _load_callback_state(self) -> None:
        # Called for the state of the checkpoint that is resumed from.
        kept = self.state.stateful_callbacks.pop(_KEY, {"attributes": {}})["attributes"]
        if "losses" in kept and len(kept["losses"]) == self.args.world_size:
            self._task_losses.load(kept["losses"][self.args.process_index])
        if "balance" in kept and self._balance is not None:
            self._balance.load(kept["balance"])
        super()._load_callback_state()


@contextmanager
def _outputs_of(model: nn.Module) -> Iterator[list[Any]]:
    """What a model returns while open."""
    seen: list[Any] = []
    handle = model.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs))
    try:
        yield seen
    finally:
        handle.remove()
