"""The model card of an ensemble: what was trained on what, and how well it does."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .._files import write_atomically
from .._records import Record
from ..ensemble.saving.ensemble_config import SavedEnsembleConfig
from ..evaluate import TaskScores, mean_scores
from ..logging import get_logger
from ..runs import (
    Costs,
    Estimate,
    Evaluation,
    RunDirectory,
    RunRecord,
    StageCost,
    TaskRecord,
    TasksRecord,
    TrainedAdapter,
)
from ..runs.costs import figure_with_prefix
from ..select import Grouping
from .choice_pictures import draw_choice

logger = get_logger(__name__)

TEMPLATE = "ensemble_card.md.jinja"

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class ResultRow:
    """One line of the card's results: a task, or the mean of all."""

    task: str
    group: str
    ensemble: TaskScores
    baseline: TaskScores | None


@dataclass
class EnsembleCardData:
    """Everything the template shows.

    All but the pictures is read from the run's records.

    Args:
        ensemble (`SavedEnsembleConfig`): base model, adapters, weights, versions.
        tasks (`dict[str, TaskRecord]`): the tasks by name.
        grouping ([`Grouping`], *optional*): the tasks' groups.
        evaluation (`Evaluation`): scores by split, system (`"ensemble"`, `"baseline"`) and task.
        configuration (`dict`): configuration and choices of the run, without paths of this machine.
        estimate (`Estimate`, *optional*): what the groups rest on.
        chosen_lengths (`dict[str, TrainedAdapter]`): trainings whose length validation chose.
        costs (`Costs`): what each system costs.
        stage_costs (`dict[str, StageCost]`): what each stage took.
        pictures (`list[str]`, *optional*): paths of the grouping's pictures beside the card.
    """

    ensemble: SavedEnsembleConfig
    tasks: dict[str, TaskRecord] = field(default_factory=dict)
    grouping: Grouping | None = None
    evaluation: Evaluation = field(default_factory=Evaluation)
    configuration: dict[str, Any] = field(default_factory=dict)
    estimate: Estimate | None = None
    chosen_lengths: dict[str, TrainedAdapter] = field(default_factory=dict)
    costs: Costs = field(default_factory=Costs)
    stage_costs: dict[str, StageCost] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)

    @classmethod
    def from_run(cls, run: RunDirectory, folder: Path | None = None) -> "EnsembleCardData":
        """Read a run, and an ensemble of it in another folder; what it does not hold yet stays empty."""

        def read(kind: type[R]) -> R | None:
            return run.read(kind) if run.has(kind) else None

        tasks, record = read(TasksRecord), read(RunRecord)
        configuration = {} if record is None else {"configuration": record.configuration, "choices": record.choices}
        ensemble = SavedEnsembleConfig.load(folder or run.ensemble)
        names = dict.fromkeys([*(member.name for member in ensemble.members), "baseline"])
        trained = {name: run.trained_adapter(name) for name in names}
        return cls(
            ensemble=ensemble,
            tasks={} if tasks is None else tasks.tasks,
            grouping=read(Grouping),
            evaluation=read(Evaluation) or Evaluation(),
            configuration=public_values(configuration),
            estimate=read(Estimate),
            chosen_lengths={
                name: own for name, own in trained.items() if own is not None and own.best_step is not None
            },
            costs=read(Costs) or Costs(),
            stage_costs={} if record is None else record.stage_costs(),
        )

    @property
    def base_name(self) -> str:
        return public_name(self.ensemble.base_model.name_or_path) or "a local model"

    @property
    def shown_split(self) -> str | None:
        return self.evaluation.reported_split

    @property
    def systems(self) -> dict[str, dict[str, TaskScores]]:
        """Scores of the shown split, by system and task."""
        return self.evaluation.scores.get(self.shown_split or "", {})

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

    def group_of(self, task: str) -> str:
        if self.grouping is not None:
            # Where groups overlap, several have trained on the task: its own is the one that it was put into.
            return next((name for name, tasks in self.grouping.groups.items() if task in tasks), "-")
        return next((member.name for member in self.ensemble.members if task in member.tasks), "-")

    def result_rows(self) -> list[ResultRow]:
        """One row per task, then their mean: scores of ensemble and baseline."""
        ensemble, baseline = self.systems.get("ensemble", {}), self.systems.get("baseline", {})
        rows = [ResultRow(task, self.group_of(task), ensemble[task], baseline.get(task)) for task in ensemble]
        if rows:
            mean = mean_scores(baseline) if baseline else None
            rows.append(ResultRow("**mean**", "", mean_scores(ensemble), mean))
        return rows

    @staticmethod
    def figure(scores: TaskScores | None, name: str) -> str:
        """A metric as the tables show it."""
        return "-" if scores is None or name not in scores.metrics else f"{scores.metrics[name]:.3f}"

    @staticmethod
    def short(value: float | None, unit: str = "") -> str:
        """A figure of a cost."""
        return "-" if value is None else figure_with_prefix(value, unit)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that any task has beside loss and accuracy."""
        scores = self.systems.get("ensemble", {}).values()
        return list(dict.fromkeys(name for score in scores for name in score.metrics))

    def card_data(self) -> ModelCardData:
        """The card's metadata block."""
        base = self.ensemble.base_model.name_or_path
        data = ModelCardData(
            # A local folder is no model id that the Hub could link to.
            base_model=base if base and not Path(base).is_absolute() and not Path(base).exists() else None,
            library_name="peft",
            tags=list(dict.fromkeys(["hf-ensemble", "ensemble", "lora", *self.ensemble.tags])),
        )
        if "ensemble" in self.systems:
            data.model_name = "ensemble"
            data.eval_results = [
                EvalResult(
                    task_type="text-generation" if self.ensemble.label_space is None else "text-classification",
                    dataset_type=task,
                    dataset_name=task,
                    dataset_split=self.shown_split,
                    metric_type=name,
                    metric_value=round(value, 4),
                )
                for task, score in self.systems["ensemble"].items()
                for name, value in {"accuracy": score.accuracy, **score.metrics}.items()
            ]
        return data


def public_name(name: str | None) -> str | None:
    """A Hub id as it is, and the last part of a folder's path: a card does not tell the paths of a machine."""
    return Path(name).name if name and Path(name).is_absolute() else name


def public_values(value: Any) -> Any:
    """A configuration with [`public_name`] applied to every string in it."""
    if isinstance(value, dict):
        return {key: public_values(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [public_values(entry) for entry in value]
    return public_name(value) if isinstance(value, str) else value


def card_metadata(given: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a card from arguments of `create_model_card`, of `Trainer` and of trl's trainers."""
    datasets = [name for key in ("dataset_tags", "dataset_name") for name in _listed(given.get(key))]
    found = {key: given.get(key) for key in ("language", "license")}
    found |= {"datasets": datasets, "tags": _listed(given.get("tags"))}
    unused = sorted(set(given) - {"language", "license", "tags", "dataset_tags", "dataset_name"})
    if unused:
        logger.info("The card is made from the run; %s are not used.", unused)
    return {key: value for key, value in found.items() if value}


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def write_model_card(
    run: str | Path,
    repo_id: str | None = None,
    folder: str | Path | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Render the card of a run's ensemble beside it, with its pictures in `assets`.

    Args:
        run (`str` or `Path`): a trainer's `output_dir`.
        repo_id (`str`, *optional*): the repository that the loading snippet names.
        folder (`str` or `Path`, *optional*): where the ensemble lies; in the run by default.
        metadata (`dict`, *optional*): further entries of the metadata block; `tags` are added to the card's own.

    Returns:
        `Path`: the card.

    Raises:
        `EnsembleLoadError`: when the run holds no ensemble.
        `RecordError`: when a record of the run is damaged.
    """
    directory = RunDirectory(run)
    folder = Path(folder or directory.ensemble)
    data = EnsembleCardData.from_run(directory, folder)
    if data.grouping is not None and len(data.grouping.task_names) > 1:
        assets = folder / "assets"
        try:
            drawn = draw_choice(data.grouping, assets, ("png",))
            data.pictures = [f"assets/{picture.name}" for picture in drawn]
        except Exception:  # a picture that cannot be drawn (fonts, backends) must not cost a finished training its card
            logger.warning("The pictures of the groups could not be drawn.", exc_info=True)
    template = resources.files("hf_ensemble.model_cards") / TEMPLATE
    block = data.card_data()
    for key, value in (metadata or {}).items():
        setattr(block, key, list(dict.fromkeys([*block.tags, *value])) if key == "tags" else value)
    card = ModelCard.from_template(
        block,
        template_str=template.read_text(encoding="utf-8"),
        data=data,
        load_from=repo_id or "path/or/user/repository",
    )
    path = folder / "README.md"
    write_atomically(path, lambda file: file.write(str(card).encode()))
    return path


def require_ensemble(run: RunDirectory) -> SavedEnsembleConfig:
    """The configuration of a run's ensemble.

    Raises:
        `EnsembleLoadError`: when the run holds no complete ensemble, or a damaged one.
    """
    config = SavedEnsembleConfig.load(run.ensemble)
    for member in config.members:
        config.check_adapter_files(member.name, run.ensemble)
    return config
