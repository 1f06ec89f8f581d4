"""What a run came to, in one file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .._records import Record
from ..evaluate import RowScores, SystemIntervals, TaskScores, mean_scores, system_intervals
from .costs import Costs, StageCost, SystemCost
from .fidelity_report import FidelityReport
from .records import RunRecord
from .result_rows import ResultTable, as_text, result_tables
from .systems import BASELINE
from .verdict import verdict

# Systems that others are compared with, the first that was scored.
_REFERENCES = (BASELINE, "base")


@dataclass(frozen=True)
class SelectionResult:
    """The outcome of a selection.

    Args:
        targets (`list[str]`): the tasks to do well on.
        tasks (`list[str]`): the tasks that were trained on.
        summary (`str`): one sentence.
        predicted_loss (`float`, *optional*): of the targets, with these tasks.
        baselines (`dict[str, float]`): predicted loss of the targets with simpler choices, see [`Selection`].
    """

    targets: list[str]
    tasks: list[str]
    summary: str
    predicted_loss: float | None = None
    baselines: dict[str, float] = field(default_factory=dict)

    @property
    def auxiliary(self) -> list[str]:
        """The tasks that are not targets."""
        return [task for task in self.tasks if task not in self.targets]


@dataclass(frozen=True)
class Results(Record):
    """What a run came to. Printed, it is the verdict and a table.

    Args:
        verdict (`str`): one sentence, see [`verdict`].
        split (`str`): the rows that were scored: `"test"` where there are test rows, else `"eval"`.
        scores (`dict[str, dict[str, TaskScores]]`): by system and task, the base model among the systems.
        mean_accuracy (`dict[str, float]`): mean over tasks, by system.
        mean_loss (`dict[str, float]`): mean over tasks, by system.
        mean_metrics (`dict[str, dict[str, float]]`): the same of each further metric.
        intervals (`dict[str, SystemIntervals]`):
            By system: 95 % intervals of its figures over the rows, and of their differences from the reference.
        reference (`str`, *optional*): what systems are compared with: one adapter for all tasks, else the base model.
        predicted_loss (`dict[str, float]`):
            Predicted validation loss of each task: under its own group's adapter, or of a selection's target.
        configuration (`dict`): see [`RunRecord`].
        versions (`dict[str, str]`): see [`RunRecord`].
        stage_costs (`dict[str, StageCost]`): what each stage took.
        system_costs (`dict[str, SystemCost]`): what each system costs to train, to keep and to run.
        groups (`dict[str, list[str]]`, *optional*): ensemble: tasks of each group.
        weights (`dict[str, dict[str, float]]`, *optional*): ensemble: weight of each adapter by task.
        equals_baseline (`bool`): ensemble: whether every task is served by the one adapter for all.
        continues_baseline (`bool`):
            Ensemble: whether that one was trained further, and serves every task, alone or beside what it was before.
        scaled_loss (`dict[str, float]`, *optional*):
            Ensemble: mean loss of `baseline`, with a scale of its logits, and of `ensemble`, on validation rows that
            neither was fitted to.
        harmful (`dict[str, int]`):
            Tasks without which the others are predicted to do better, and the number of others that would.
        selection (`SelectionResult`, *optional*): selection: what was chosen.
        fidelity (`FidelityReport`, *optional*): where it was measured.
    """

    format = "hf_ensemble.results"
    format_version = 5

    verdict: str
    split: str
    scores: dict[str, dict[str, TaskScores]]
    mean_accuracy: dict[str, float]
    mean_loss: dict[str, float]
    mean_metrics: dict[str, dict[str, float]]
    configuration: dict[str, Any]
    versions: dict[str, str]
    stage_costs: dict[str, StageCost]
    system_costs: dict[str, SystemCost]
    intervals: dict[str, SystemIntervals] = field(default_factory=dict)
    reference: str | None = None
    predicted_loss: dict[str, float] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    equals_baseline: bool = False
    continues_baseline: bool = False
    scaled_loss: dict[str, float] = field(default_factory=dict)
    harmful: dict[str, int] = field(default_factory=dict)
    selection: SelectionResult | None = None
    fidelity: FidelityReport | None = None

    @classmethod
    def of(
        cls,
        record: RunRecord,
        split: str,
        scores: Mapping[str, Mapping[str, TaskScores]],
        rows: Mapping[str, Mapping[str, RowScores]] | None = None,
        costs: Costs | None = None,
        **outcome: Any,
    ) -> "Results":
        """From a run's record and what was scored.

        Args:
            record (`RunRecord`): the run's.
            split (`str`): which rows were scored.
            scores (`dict[str, dict[str, TaskScores]]`): by system and task.
            rows (`dict[str, dict[str, RowScores]]`, *optional*): of single rows, by system and task.
            costs (`Costs`, *optional*): of the systems.
            outcome: the other optional fields.
        """
        systems = {system: dict(by_task) for system, by_task in scores.items()}
        means = {system: mean_scores(by_task) for system, by_task in systems.items()}
        reference = next((own for own in _REFERENCES if own in systems and len(systems) > 1), None)
        figures = _of_figures(rows or {}, systems)
        facts = {
            "scores": systems,
            "mean_loss": {system: mean.loss for system, mean in means.items()},
            "intervals": system_intervals(figures, reference if reference in figures else None),
            "reference": reference,
            **outcome,
        }
        return cls(
            verdict=verdict(**{key: facts[key] for key in _VERDICT_FACTS if key in facts}),
            split=split,
            mean_accuracy={system: mean.accuracy for system, mean in means.items()},
            mean_metrics={system: mean.metrics for system, mean in means.items()},
            configuration=record.configuration,
            versions=record.versions,
            stage_costs=record.stage_costs(),
            system_costs={own: cost for own, cost in (costs or Costs()).systems.items() if own in systems},
            **facts,
        )

    def tables(self) -> list[ResultTable]:
        """The figures as text, a table for each: the loss first."""
        return result_tables(self.scores, self.intervals, self.split)

    def __str__(self) -> str:
        return "\n\n".join([self.verdict, *map(as_text, self.tables())])


# What the verdict is made from.
_VERDICT_FACTS = (
    "scores",
    "mean_loss",
    "intervals",
    "reference",
    "weights",
    "scaled_loss",
    "equals_baseline",
    "continues_baseline",
    "groups",
    "harmful",
    "selection",
)


def _of_figures(
    rows: Mapping[str, Mapping[str, RowScores]], scores: Mapping[str, Mapping[str, TaskScores]]
) -> dict[str, dict[str, RowScores]]:
    """The rows of the systems and tasks that have a score."""
    return {
        system: {task: own for task, own in by_task.items() if task in scores.get(system, {})}
        for system, by_task in rows.items()
        if system in scores
    }
