"""Label sets of classification tasks that share the outputs of one model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import TaskError


@dataclass(frozen=True)
class LabelSpace:
    """The outputs of a classification head and the outputs that belong to each task.

    Labels with the same name share an output, such as "positive" in two sentiment tasks. Labels without a name (plain
    integers) are never shared between tasks.

    Args:
        names (`tuple[str, ...]`): name of each output.
        task_labels (`dict[str, tuple[int, ...]]`): output indices of each task's labels, in the order of its labels.
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

    @property
    def is_shared(self) -> bool:
        """Whether the tasks have one label set."""
        return all(len(own) == len(self.names) for own in self.task_labels.values())

    def output_of(self, task: str, label: int) -> int:
        """Index of the output for a task's label."""
        return self.task_labels[task][label]

    def mask(self, tasks: Sequence[str]) -> torch.Tensor:
        """Mask of the outputs that belong to each row's task, bool `(batch, num_labels)`.

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
