"""An ensemble for the rows of one task, as any other model of `transformers` takes part in a pipeline."""

import copy
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput


class TaskModel(nn.Module):
    """An ensemble whose rows are all of one task; its class has the name of the base model's, which pipelines look at.

    A classifier's outputs, and the labels that it takes, are those of the task alone, in their order.

    Args:
        ensemble (`PeftEnsembleModel`): the ensemble, which is shared and not copied.
        task (`str`): the task.

    Attributes:
        config (`PreTrainedConfig`): the base model's, with the task's own labels.
    """

    def __init__(self, ensemble: nn.Module, task: str):
        super().__init__()
        self.ensemble = ensemble
        self.task = task
        self.config = copy.deepcopy(ensemble.config)
        space = ensemble.label_space
        self._labels = None if space is None else list(space.task_labels[task])
        if self._labels is not None:
            # Labels without names are named by the task and their number.
            names = [space.names[label].removeprefix(f"{task}:") for label in self._labels]
            self.config.id2label = dict(enumerate(names))
            self.config.label2id = {name: number for number, name in enumerate(names)}
        self.__class__ = type(type(ensemble.model.get_base_model()).__name__, (TaskModel,), {})
        self.train(ensemble.training)

    @property
    def device(self) -> torch.device:
        return self.ensemble.device

    @property
    def dtype(self) -> torch.dtype:
        return self.ensemble.dtype

    @property
    def generation_config(self):
        return self.ensemble.generation_config

    @property
    def input_modalities(self) -> tuple[str, ...]:
        return ("text",)

    output_modalities = input_modalities

    def can_generate(self) -> bool:
        """Whether the base model generates."""
        return self.ensemble.can_generate()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> Any:
        """[`PeftEnsembleModel.forward`] for this task; a classifier's logits are `(B, number of the task's labels)`."""
        if self._labels is None:
            return self.ensemble(input_ids=input_ids, labels=labels, task=self.task, return_dict=return_dict, **inputs)
        logits = self.ensemble(input_ids=input_ids, task=self.task, **inputs).logits[:, self._labels]
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """[`PeftEnsembleModel.generate`] for this task."""
        return self.ensemble.generate(*args, **{**kwargs, "task": self.task})
