"""What the cards of a run show, read from its records."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from ..ensemble.members import BaseModelReference
from ..ensemble.saving.auto_classes import CLASSIFIER
from ..ensemble.saving.card import public_name, saved_auto_class
from ..ensemble.saving.ensemble_config import SavedEnsembleConfig
from ..evaluate import TaskScores
from ..runs import (
    Boosting,
    EnsembleWeights,
    Estimate,
    Evaluation,
    FidelityReport,
    Results,
    RunDirectory,
    RunRecord,
    TaskRecord,
    TasksRecord,
    TrainedAdapter,
)
from ..runs.costs import figure_with_prefix
from ..runs.systems import BASELINE, system_name
from ..select import Grouping, Selection
from ..tasks import LabelSpace, RowFormat


@dataclass
class RunCardData:
    """What the cards of ensembles and of selections show alike.

    Args:
        tasks (`dict[str, TaskRecord]`): the tasks by name.
        row_format (`RowFormat`, *optional*): of their rows.
        evaluation (`Evaluation`): scores by split, system and task.
        results (`Results`, *optional*): what the run came to.
        configuration (`dict`): configuration and choices of the run, without paths of this machine.
        versions (`dict[str, str]`): packages of the run.
        estimate (`Estimate`, *optional*): what the groups rest on.
        fidelity (`FidelityReport`, *optional*): predictions against true fine-tunings, where they were measured.
        chosen_lengths (`dict[str, TrainedAdapter]`): trainings whose length validation chose.
        pictures (`dict[str, str]`): paths of pictures beside the card, by name.
    """

    tasks: dict[str, TaskRecord] = field(default_factory=dict)
    row_format: RowFormat | None = None
    evaluation: Evaluation = field(default_factory=Evaluation)
    results: Results | None = None
    configuration: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    estimate: Estimate | None = None
    fidelity: FidelityReport | None = None
    chosen_lengths: dict[str, TrainedAdapter] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)

    @property
    def choices(self) -> dict[str, Any]:
        return self.configuration.get("choices", {})

    @staticmethod
    def system_name(system: str) -> str:
        """What a system is called where people read."""
        return system_name(system)

    @staticmethod
    def short(value: float | None, unit: str = "") -> str:
        """A figure of a cost."""
        return "-" if value is None else figure_with_prefix(value, unit)

    @property
    def evidence(self) -> str:
        """What the penalty of the estimates was found from, in words."""
        if self.estimate is None:
            return ""
        runs = len(self.estimate.calibration_subsets)
        return {
            "observed_runs": "the losses of the one adapter for all datasets"
            if runs == 1
            else f"the losses of {runs} fine-tunings",
            "replay": "a replay of the training on the captured gradients",
            "validation_loss": "the least predicted validation loss",
        }[self.estimate.l2_evidence]

    @property
    def hub_datasets(self) -> list[str]:
        return list(dict.fromkeys(name for task in self.tasks.values() for name in task.hub_datasets))

    @property
    def num_labels(self) -> int | None:
        """Outputs of a classifier whose labels have names."""
        names = {task: own.label_names for task, own in self.tasks.items() if own.label_names is not None}
        return len(LabelSpace.from_label_names(names)) if names else None

    @property
    def examples(self) -> dict[str, Any]:
        return {name: task.example for name, task in self.tasks.items() if task.example}

    def metadata(self, system: str, name: str) -> dict[str, Any]:
        """Metadata of a run: its datasets, examples to try, and the evaluation results of one system."""
        entries: dict[str, Any] = {}
        if self.hub_datasets:
            entries["datasets"] = self.hub_datasets
        if self.examples:
            entries["widget"] = [
                {"text": own, "example_title": task}
                if isinstance(own, str)
                else {"messages": own, "example_title": task}
                for task, own in self.examples.items()
            ]
        results = [] if self.results is None else self._eval_results(self.results.scores.get(system, {}))
        if results:
            entries["model-index"] = eval_results_to_model_index(name, results)
        return entries

    def _eval_results(self, scores: Mapping[str, TaskScores]) -> list[EvalResult]:
        kind = "text-classification" if self.row_format is RowFormat.CLASSIFICATION else "text-generation"
        found = []
        known = [name for task in self.tasks.values() for name in task.hub_datasets]
        for task, score in scores.items():
            # The Hub takes results on one dataset for one task's: tasks that share a dataset go by their own names.
            ids = [
                name for name in (self.tasks[task].hub_datasets if task in self.tasks else []) if known.count(name) == 1
            ]
            figures = {"accuracy": score.accuracy, "loss": score.loss, **score.metrics}
            found += [
                EvalResult(
                    task_type=kind,
                    task_name=kind.replace("-", " ").capitalize(),
                    dataset_type=ids[0] if len(ids) == 1 else task,
                    dataset_name=task,
                    dataset_split=self.results.split,
                    metric_type=name,
                    metric_name=name.replace("_", " ").capitalize(),
                    metric_value=round(value, 4),
                )
                for name, value in figures.items()
                if isfinite(value)
            ]
        return found


@dataclass
class EnsembleCardData(RunCardData):
    """Everything the card of an ensemble shows.

    Args:
        ensemble (`SavedEnsembleConfig`): base model, adapters, weights, versions.
        grouping ([`Grouping`], *optional*): the tasks' groups.
        weights (`EnsembleWeights`, *optional*): the weights, and what they were chosen by.
        boosting (`Boosting`, *optional*): the boosting steps.
    """

    ensemble: SavedEnsembleConfig | None = None
    grouping: Grouping | None = None
    weights: EnsembleWeights | None = None
    boosting: Boosting | None = None

    @classmethod
    def from_run(cls, run: RunDirectory, folder: Path | None = None) -> "EnsembleCardData":
        """Read a run, and an ensemble of it in another folder; what it does not hold yet stays empty."""
        ensemble = SavedEnsembleConfig.load(folder or run.ensemble)
        names = [*(member.name for member in ensemble.members), BASELINE]
        return cls(
            **_shared(run, names),
            ensemble=ensemble,
            grouping=run.read_if_there(Grouping),
            weights=run.read_if_there(EnsembleWeights),
            boosting=run.read_if_there(Boosting),
        )

    def group_of(self, task: str) -> str:
        if self.grouping is not None:
            # Where groups overlap, several have trained on the task: its own is the one that it was put into.
            return next((name for name, tasks in self.grouping.groups.items() if task in tasks), "-")
        return next((member.name for member in self.ensemble.members if task in member.tasks), "-")

    def predicted_and_true(self) -> dict[str, tuple[float, float]]:
        """Predicted loss of each task under its own group's adapter, and the ensemble's measured one."""
        measured = self.evaluation.scores.get("eval", {}).get("ensemble", {})
        if self.estimate is None or self.grouping is None:
            return {}
        predicted = {task: self.estimate.predicted_loss.get(self.group_of(task), {}).get(task) for task in measured}
        return {task: (own, measured[task].loss) for task, own in predicted.items() if own is not None}


@dataclass
class SelectionCardData(RunCardData):
    """Everything the card of a selection's adapter shows.

    Args:
        selection ([`Selection`], *optional*): the tasks that it was trained on.
        base_model (`BaseModelReference`, *optional*): the base model.
    """

    selection: Selection | None = None
    base_model: BaseModelReference | None = None

    @classmethod
    def from_run(cls, run: RunDirectory, folder: Path | None = None) -> "SelectionCardData":
        """Read a run, and its adapter in another folder; what it does not hold yet stays empty.

        Raises:
            `RecordError`: for a run without a selection.
        """
        data = cls(**_shared(run, ["adapter"]), selection=run.read(Selection))
        model = run.record.configuration["model"]
        auto_class = saved_auto_class(folder or run.adapter)
        if data.row_format is RowFormat.CLASSIFICATION and auto_class != CLASSIFIER:
            # An encoder whose head are the labels' texts has no auto class, and no trained head.
            auto_class = ""
        data.base_model = BaseModelReference(
            model["name"] or "", model["revision"], auto_class, num_labels=data.num_labels if auto_class else None
        )
        return data


def _shared(run: RunDirectory, trainings: list[str]) -> dict[str, Any]:
    tasks, record = run.read_if_there(TasksRecord), run.read_if_there(RunRecord)
    trained = {name: run.trained_adapter(name) for name in dict.fromkeys(trainings)}
    found = {} if record is None else {"configuration": record.configuration, "choices": record.choices}
    return {
        "tasks": {} if tasks is None else tasks.tasks,
        "row_format": None if tasks is None else RowFormat(tasks.row_format),
        "evaluation": run.read_if_there(Evaluation) or Evaluation(),
        "results": run.read_if_there(Results) if run.has(Evaluation) else None,
        "configuration": public_values(found),
        "versions": {} if record is None else record.versions,
        "estimate": run.read_if_there(Estimate),
        "fidelity": run.read_if_there(FidelityReport),
        "chosen_lengths": {name: own for name, own in trained.items() if own is not None and own.best_step is not None},
    }


def public_values(value: Any) -> Any:
    """A configuration with [`public_name`] applied to every string in it."""
    if isinstance(value, dict):
        return {key: public_values(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [public_values(entry) for entry in value]
    return public_name(value) if isinstance(value, str) else value
