"""Label sets: many classification tasks over the outputs of one model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import TaskError


@dataclass(frozen=True)
class LabelSpace:
    """The outputs of one classification head, and which of them each task may answer with.

    Labels of the same name are one output: "positive" of two sentiment tasks is learnt together. Labels without a name
    (plain integers) are never shared between tasks.

    Args:
        names (`tuple[str, ...]`):
            Name of each output.
        task_labels (`dict[str, tuple[int, ...]]`):
            For each task, the outputs of its labels, in the order of the task's own label numbers.
    """

    names: tuple[str, ...]
    task_labels: Mapping[str, tuple[int, ...]]

    @classmethod
    def from_label_names(cls, label_names: Mapping[str, Sequence[str]]) -> "LabelSpace":
        names = tuple(dict.fromkeys(name for labels in label_names.values() for name in labels))
        index = {name: i for i, name in enumerate(names)}
        return cls(names, {task: tuple(index[name] for name in labels) for task, labels in label_names.items()})

    def __len__(self) -> int:
        return len(self.names)

    def output_of(self, task: str, label: int) -> int:
        """Output index of a task's own label number."""
        return self.task_labels[task][label]

    def mask(self, tasks: Sequence[str]) -> torch.Tensor:
        """Which outputs each row may answer with: bool `(batch, num_labels)`.

        Raises:
            `TaskError`: for a task without a label set.
        """
        mask = torch.zeros(len(tasks), len(self.names), dtype=torch.bool)
        for row, task in enumerate(tasks):
            if task not in self.task_labels:
                raise TaskError(f"Task {task!r} has no label set; tasks with one: {sorted(self.task_labels)}.")
            mask[row, list(self.task_labels[task])] = True
        return mask

    def to_dict(self) -> dict:
        return {"names": list(self.names), "task_labels": {task: list(v) for task, v in self.task_labels.items()}}

    @classmethod
    def from_dict(cls, data: Mapping) -> "LabelSpace":
        return cls(tuple(data["names"]), {task: tuple(v) for task, v in data["task_labels"].items()})
