"""What the boosting steps of a run came to."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from .._records import Record

# Name of the member whose logits are taken off those of each step: the adapter at its start.
START = "start"


@dataclass(frozen=True)
class BoostingStep:
    """One step of boosting. Losses are means over the step's tasks, in nats.

    Args:
        name (`str`): name of the member.
        target (`str`): the group or task that the step was for.
        tasks (`list[str]`): the tasks that it was made for.
        method (`str`): see `boosting_method`.
        kept (`bool`): whether it is a member of the ensemble.
        weight (`float`): of the step's logits, as a line search on validation rows has found it.
        validation_loss (`float`): before the step.
        validation_loss_after (`float`): with the step.
        gain (`float`): how much the validation loss falls on rows that the weight was not found on.
        standard_error (`float`, *optional*): of the gain, paired over rows; `None` where a task has a single row.
        training_loss (`float`): on a sample of training rows, before the step.
        training_loss_after (`float`): with the step.
        flops (`float`): floating point operations of the step, the choice of its group or task among them.
        seconds (`float`): wall time.
    """

    name: str
    target: str
    tasks: list[str]
    method: str
    kept: bool
    weight: float
    validation_loss: float
    validation_loss_after: float
    gain: float
    standard_error: float | None
    training_loss: float
    training_loss_after: float
    flops: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Boosting(Record):
    """The boosting steps of a run, in their order.

    Args:
        steps (`list[BoostingStep]`): kept ones and others.
    """

    format = "hf_ensemble.boosting"
    format_version = 2

    steps: list[BoostingStep] = field(default_factory=list)

    @property
    def kept(self) -> list[BoostingStep]:
        """The steps that are members."""
        return [step for step in self.steps if step.kept]

    def weights(
        self, before: Mapping[str, Mapping[str, float]], scales: Mapping[str, float]
    ) -> dict[str, dict[str, float]]:
        """The weights with the kept steps, for the logits s sum_k w_k f_k + sum_b eta_b (f_b - f_start).

        Args:
            before (`dict[str, dict[str, float]]`): its weights w without them, by task.
            scales (`dict[str, float]`): the scale s of each task's logits, 1 for tasks left out.
        """
        weights = {task: dict(row) for task, row in before.items()}
        for step in self.kept:
            for task in step.tasks:
                weights[task] = with_step(weights[task], step.name, step.weight / scales.get(task, 1.0))
        return weights


def with_step(row: Mapping[str, float], name: str, weight: float) -> dict[str, float]:
    """Weights of a task with weight (f_name - f_start) added."""
    row = {**row, name: row.get(name, 0.0) + weight}
    row[START] = row.pop(START, 0.0) - weight
    return row
