"""Ordinary trainers over a token table of several tasks, whose rows carry `task` and `example_id`."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from transformers import Trainer
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.trainer_utils import has_length
from trl import SFTTrainer

from .._compat import keep_quantized_weights_in_place
from ..models.zero_sharding import num_cut
from ..tasks import (
    EXAMPLE_ID,
    IGNORE_INDEX,
    META_COLUMNS,
    TASK,
    LabelSpace,
    TaskCollator,
    TaskWeightedSampler,
    pop_meta,
    restrict_to_labels,
)
from ..tasks.columns import ROW_LENGTHS
from .inputs.sharding import Sharding, as_not_launched, stop_averaging
from .losses.task_loss_mixin import TaskLossMixin
from .resumed_training import ResumedTrainingMixin
from .task_evaluation import TaskEvaluationMixin
from .training_usage import TrainingUsageMixin


class TaskColumnsMixin:
    """Keeps `task` and `example_id` up to the batch and takes them out before the model; draws rows by task weight.

    Args:
        label_space (`LabelSpace`, *optional*): label sets of classification tasks; the loss counts a row's own labels.
        sampling_weights (`dict[str, float]`, *optional*): relative weight of one row of each task; all alike by
            default.
        has_tasks (`bool`, *optional*, defaults to `True`):
            Whether rows carry their task. A trainer without tasks is its parent.

    Attributes:
        batch_tasks (`list[str]`): task of each row of the batch that the model is run on.
    """

    # Of a run that shards its base.
    _sharding: Sharding | None = None
    # The parents' constructors look at the collator's class.
    _wraps_collator: bool = False

    def __init__(
        self,
        *args: Any,
        label_space: LabelSpace | None = None,
        sampling_weights: Mapping[str, float] | None = None,
        has_tasks: bool = True,
        **kwargs: Any,
    ):
        self.has_tasks = has_tasks
        self.label_space = label_space
        self.sampling_weights = dict(sampling_weights or {})
        self.batch_tasks: list[str] = []
        self.batch_ids: list[str] = []
        self._wraps_collator = False
        super().__init__(*args, **kwargs)
        if self._sharding is not None:
            # Over such a base `Trainer` averages the adapter's gradients itself; accelerate refuses it.
            self.is_distributed_loading_by_transformers = True
        if has_tasks:
            self._wraps_collator = True
            self.data_collator = self._data_collator
            keep_quantized_weights_in_place(self.model)

    @property
    def data_collator(self) -> Any:
        """From rows to a batch. One that is set after the constructor keeps rows' tasks, too, where they have one."""
        return self._data_collator

    @data_collator.setter
    def data_collator(self, collator: Any) -> None:
        is_wrapped = isinstance(collator, TaskCollator) or not self._wraps_collator
        self._data_collator = collator if is_wrapped else TaskCollator(collator)

    def create_accelerator_and_postprocess(self) -> None:
        with nullcontext() if self._sharding is None else as_not_launched():
            super().create_accelerator_and_postprocess()

    def _inner_training_loop(self, *args: Any, **kwargs: Any):
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            if self._sharding is not None:
                stop_averaging(self.model)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        # What is to be sharded may not fit on a device, and what is sharded lies there.
        if self._sharding is None:
            super()._move_model_to_device(model, device)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        found = super().floating_point_ops(inputs)
        # The parent's estimate, for the parameters that look empty to it: DeepSpeed has cut them.
        missed = num_cut(self.model) if found else 0
        return found + 6 * inputs[self.model.main_input_name].numel() * missed if missed else found

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if self.has_tasks:
            self._signature_columns = list(dict.fromkeys([*self._signature_columns, *META_COLUMNS]))

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        replacement = getattr(args, "sample_with_replacement", False)
        grouped = args.train_sampling_strategy == "group_by_length"
        knows_tasks = TASK in (getattr(dataset, "column_names", None) or ())
        if not (self.has_tasks and has_length(dataset) and knows_tasks):
            return super()._get_train_sampler(train_dataset)
        weights = {task: self.sampling_weights.get(task, 1.0) for task in dataset.unique(TASK)}
        if len(set(weights.values())) <= 1 and not replacement and not grouped:
            return super()._get_train_sampler(train_dataset)
        return TaskWeightedSampler(
            dataset[TASK],
            weights,
            args.seed if args.data_seed is None else args.data_seed,
            replacement,
            [len(tokens) for tokens in dataset["input_ids"]] if grouped else None,
            args.train_batch_size * args.gradient_accumulation_steps,
        )

    def _run_epoch(self, *args: Any, epoch: int, train_dataloader: Any, **kwargs: Any) -> None:
        # Dataloaders that skip what a resumed training has seen do not pass the epoch on to a sampler of several
        # processes (accelerate 1.15).
        sampler = _sampler_of(train_dataloader)
        if self.has_tasks and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        super()._run_epoch(*args, epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def _prepare_inputs(self, inputs):
        # Here, and not in `compute_loss`, so that a subclass's own loss gets what its model takes.
        inputs = super()._prepare_inputs(inputs)
        if self.has_tasks:
            meta = pop_meta(inputs)
            self.batch_tasks, self.batch_ids = meta.get(TASK, []), meta.get(EXAMPLE_ID, [])
            self.batch_row_lengths = meta.get(ROW_LENGTHS)
        return inputs


def _sampler_of(dataloader: Any) -> Any:
    """What decides on the order of the rows, within all that accelerate wraps around it."""
    batches = getattr(dataloader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return getattr(batches, "sampler", None)


class TaskTrainer(
    TaskColumnsMixin, TaskLossMixin, TaskEvaluationMixin, TrainingUsageMixin, ResumedTrainingMixin, Trainer
):
    """`transformers.Trainer` over a token table of several tasks; takes the arguments of both.

    A classifier's loss is the mean over the rows of an optimizer step, however they are cut into batches and processes.
    This differs from a plain `Trainer` on purpose: the classifiers of transformers 5.23 average over each batch where
    `Trainer` expects them to average over the step, so its loss and gradients are the sum over the accumulated batches.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.label_space is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = self.compute_loss_func
        # Not for longer than this call: a subclass's own loss is scaled as in a plain `Trainer`.
        loss_func = given or self.label_smoother or _mean_cross_entropy
        self.compute_loss_func = partial(self._loss_over_own_labels, loss_func)
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.compute_loss_func = given

    def prediction_step(self, *args: Any, **kwargs: Any):
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        # Without labels no loss has restricted them.
        if self.label_space is not None and isinstance(logits, torch.Tensor):
            logits = restrict_to_labels(logits, self.label_space.mask(self.batch_tasks))
        return loss, logits, labels

    def _loss_over_own_labels(self, loss_func, outputs, labels, num_items_in_batch=None):
        outputs["logits"] = restrict_to_labels(outputs["logits"], self.label_space.mask(self.batch_tasks))
        return loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)

    def _token_losses(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor | None:
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if logits is None or labels.is_floating_point():
            return None
        if labels.dim() == 1:
            return F.cross_entropy(logits.float(), labels, reduction="none").unsqueeze(1)
        # Virtual tokens stand before the row's own.
        logits = logits[:, -labels.shape[1] :]
        if self.shifts_labels:
            logits, labels = logits[:, :-1], labels[:, 1:]
        mask = labels != IGNORE_INDEX
        losses = F.cross_entropy(logits[mask].float(), labels[mask], reduction="none")
        return losses.new_zeros(mask.shape).masked_scatter(mask, losses)


def _mean_cross_entropy(outputs, labels, num_items_in_batch=None):
    """Mean over the step's rows; over the batch's where `Trainer` has not counted them and averages by itself."""
    return fixed_cross_entropy(outputs["logits"].float(), labels, num_items_in_batch)


class TaskSFTTrainer(
    TaskColumnsMixin, TaskLossMixin, TaskEvaluationMixin, TrainingUsageMixin, ResumedTrainingMixin, SFTTrainer
):
    """`trl.SFTTrainer` over a token table of several tasks; takes the arguments of both."""

    def _token_losses(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        log_probs = outputs.log_probs
        return -log_probs * log_probs.exp().detach() if self.args.loss_type == "dft" else -log_probs

    def _auxiliary_loss(self, outputs: Any) -> torch.Tensor | float:
        if not self.aux_loss_enabled:
            return 0.0
        return self.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps
