"""What a run came to, in one file."""

from dataclasses import dataclass, field
from typing import Any

from .._records import Record
from ..evaluate import TaskScores, mean_scores
from .fidelity_report import FidelityReport
from .records import RunRecord


@dataclass(frozen=True)
class SelectionResult:
    """The outcome of a selection: the targets, the tasks that were trained on, and one sentence of summary."""

    targets: list[str]
    tasks: list[str]
    summary: str


@dataclass(frozen=True)
class Results(Record):
    """What a run came to.

    Args:
        split (`str`): the rows that were scored: `"test"` where there are test rows, else `"eval"`.
        scores (`dict[str, dict[str, TaskScores]]`): by system and task, the base model among the systems.
        mean_accuracy (`dict[str, float]`): mean over tasks, by system.
        mean_loss (`dict[str, float]`): mean over tasks, by system.
        mean_metrics (`dict[str, dict[str, float]]`): the same of each further metric.
        configuration (`dict`): see [`RunRecord`].
        versions (`dict[str, str]`): see [`RunRecord`].
        stage_seconds (`dict[str, float]`): wall time of each stage; null where it was interrupted.
        groups (`dict[str, list[str]]`, *optional*): ensemble: tasks of each group.
        weights (`dict[str, dict[str, float]]`, *optional*): ensemble: weight of each adapter by task.
        selection (`SelectionResult`, *optional*): selection: what was chosen.
        fidelity (`FidelityReport`, *optional*): where it was measured.
    """

    format = "hf_ensemble.results"
    format_version = 2

    split: str
    scores: dict[str, dict[str, TaskScores]]
    mean_accuracy: dict[str, float]
    mean_loss: dict[str, float]
    mean_metrics: dict[str, dict[str, float]]
    configuration: dict[str, Any]
    versions: dict[str, str]
    stage_seconds: dict[str, float | None]
    groups: dict[str, list[str]] = field(default_factory=dict)
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    selection: SelectionResult | None = None
    fidelity: FidelityReport | None = None

    @classmethod
    def of(cls, record: RunRecord, split: str, scores: dict[str, dict[str, TaskScores]], **outcome: Any) -> "Results":
        """From a run's record and what was scored; `outcome` are the optional fields."""
        means = {system: mean_scores(by_task) for system, by_task in scores.items()}
        return cls(
            split=split,
            scores=scores,
            mean_accuracy={system: mean.accuracy for system, mean in means.items()},
            mean_loss={system: mean.loss for system, mean in means.items()},
            mean_metrics={system: mean.metrics for system, mean in means.items()},
            configuration=record.configuration,
            versions=record.versions,
            stage_seconds={name: stage.seconds for name, stage in record.stages.items()},
            **outcome,
        )
