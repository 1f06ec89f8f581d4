"""Ordinary trainers over a token table of several tasks, whose rows carry `task` and `example_id`."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import Trainer
from transformers.loss.loss_utils import fixed_cross_entropy
from trl import SFTTrainer

from .._compat import keep_quantized_weights_in_place
from ..tasks import (
    META_COLUMNS,
    TASK,
    LabelSpace,
    TaskCollator,
    TaskWeightedSampler,
    pop_meta,
    restrict_to_labels,
)
from .resumed_training import ResumedTrainingMixin
from .task_evaluation import TaskEvaluationMixin


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
        super().__init__(*args, **kwargs)
        if has_tasks:
            if not isinstance(self.data_collator, TaskCollator):
                self.data_collator = TaskCollator(self.data_collator)
            keep_quantized_weights_in_place(self.model)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if self.has_tasks:
            self._signature_columns = list(dict.fromkeys([*self._signature_columns, *META_COLUMNS]))

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if len(set(self.sampling_weights.values())) <= 1:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return TaskWeightedSampler(dataset[TASK], self.sampling_weights, seed)

    def _prepare_inputs(self, inputs):
        # Here, and not in `compute_loss`, so that a subclass's own loss gets what its model takes.
        inputs = super()._prepare_inputs(inputs)
        if self.has_tasks:
            self.batch_tasks = pop_meta(inputs).get(TASK, [])
        return inputs


class TaskTrainer(TaskColumnsMixin, TaskEvaluationMixin, ResumedTrainingMixin, Trainer):
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

    def _loss_over_own_labels(self, loss_func, outputs, labels, num_items_in_batch=None):
        outputs["logits"] = restrict_to_labels(outputs["logits"], self.label_space.mask(self.batch_tasks))
        return loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)


def _mean_cross_entropy(outputs, labels, num_items_in_batch=None):
    """Mean over the step's rows; over the batch's where `Trainer` has not counted them and averages by itself."""
    return fixed_cross_entropy(outputs["logits"].float(), labels, num_items_in_batch)


class TaskSFTTrainer(TaskColumnsMixin, TaskEvaluationMixin, ResumedTrainingMixin, SFTTrainer):
    """`trl.SFTTrainer` over a token table of several tasks; takes the arguments of both."""
