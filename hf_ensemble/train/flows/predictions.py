"""What a run's adapters and its ensemble predict, in the evaluation loop of the parent trainer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers.modeling_outputs import Seq2SeqLMOutput

from ...ensemble import PeftEnsembleModel
from ..losses.step_loss import fused_output
from ..model_state import ModelState
from ..task_trainer import TaskSFTTrainer, TaskTrainer
from .context import FlowContext


@contextmanager
def prediction_trainer(
    context: FlowContext, tables: Mapping[str, Dataset], ensemble: PeftEnsembleModel | None = None
) -> Iterator[TaskTrainer | TaskSFTTrainer]:
    """While open, a trainer of the user's own class whose evaluation sets are these tables; the model is left as it is.

    Args:
        context (`FlowContext`): what the run works on.
        tables (`dict[str, Dataset]`): token table of each task.
        ensemble (`PeftEnsembleModel`, *optional*): what predicts; the active adapter by default.
    """
    with ModelState(context.model).restored():
        trainer = context.make_predictor(tables)
        if ensemble is not None:
            # By the forward of the base model.
            trainer._set_signature_columns_if_needed()
            trainer.model = trainer.model_wrapped = _EnsembleOfBatches(ensemble, trainer)
            # Router losses are of a training.
            trainer.aux_loss_enabled = False
        try:
            yield trainer
        finally:
            trainer.accelerator.free_memory()


class _EnsembleOfBatches(nn.Module):
    """An ensemble as a trainer calls its model: the tasks of the rows are those of the trainer's batch.

    Args:
        ensemble (`PeftEnsembleModel`): the ensemble.
        trainer (`TaskTrainer` or `TaskSFTTrainer`): has the batch.
    """

    def __init__(self, ensemble: PeftEnsembleModel, trainer: TaskTrainer | TaskSFTTrainer):
        super().__init__()
        self.ensemble = ensemble
        # Not a module of this one.
        self._batch_tasks = lambda: trainer.batch_tasks

    @property
    def config(self):
        return self.ensemble.config

    def forward(self, fused_lm_head: bool = False, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        """The ensemble's outputs; with `fused_lm_head`, what `SFTTrainer` expects of a model that it has patched."""
        outputs = self.ensemble(task=self._batch_tasks() or None, **inputs)
        if isinstance(outputs, Seq2SeqLMOutput) and outputs.encoder_last_hidden_state is None:
            # An adapter's output has its encoder's states too; an ensemble has none, and `compute_metrics` of both gets
            # the same structure.
            outputs["encoder_last_hidden_state"] = outputs.logits.new_full((len(outputs.logits), 1, 1), torch.nan)
        return fused_output(outputs.logits, inputs["labels"]) if fused_lm_head else outputs
