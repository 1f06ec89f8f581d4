"""The model card of an ensemble: what was trained on what, and how well it does."""

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .._files import read_json, write_atomically
from ..ensemble.saving.ensemble_config import SavedEnsembleConfig
from ..errors import EnsembleLoadError
from ..logging import get_logger
from ..select import Grouping
from .choice_pictures import draw_choice

logger = get_logger(__name__)

TEMPLATE = "ensemble_card.md.jinja"


@dataclass
class EnsembleCardData:
    """Everything the template shows.

    All but the pictures is read from the run's files.

    Args:
        ensemble (`SavedEnsembleConfig`): base model, adapters, weights, versions.
        tasks (`dict`): as in `tasks.json`.
        grouping ([`Grouping`], *optional*): the tasks' groups.
        results (`dict`): scores by split, system (`"ensemble"`, `"baseline"`) and task.
        configuration (`dict`): configuration and choices as in `run.json`, without paths of this machine.
        estimate (`dict`): as in `estimate/estimate.json`.
        pictures (`list[str]`, *optional*): paths of the grouping's pictures beside the card.
    """

    ensemble: SavedEnsembleConfig
    tasks: dict[str, Any] = field(default_factory=dict)
    grouping: Grouping | None = None
    results: dict[str, dict[str, dict[str, dict[str, float]]]] = field(default_factory=dict)
    configuration: dict[str, Any] = field(default_factory=dict)
    estimate: dict[str, Any] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)

    @classmethod
    def from_run(cls, run: Path) -> "EnsembleCardData":
        """Read a run directory; what it does not hold yet stays empty."""

        def read(name: str, default: Any) -> Any:
            return read_json(run / name) if (run / name).is_file() else default

        return cls(
            ensemble=SavedEnsembleConfig.load(run / "ensemble"),
            tasks=read("tasks.json", {}).get("tasks", {}),
            grouping=Grouping.load(run / "groups.json") if (run / "groups.json").is_file() else None,
            results=read("evaluation.json", {}),
            configuration=_public({key: read("run.json", {}).get(key, {}) for key in ("configuration", "choices")}),
            estimate=read("estimate/estimate.json", {}),
        )

    @property
    def base_name(self) -> str:
        return public_name(self.ensemble.base_model.name_or_path) or "a local model"

    @property
    def shown_split(self) -> str | None:
        """The split whose results the card shows: held-out test rows where there are any."""
        return next((split for split in ("test", "eval", *self.results) if split in self.results), None)

    def group_of(self, task: str) -> str:
        if self.grouping is not None:
            # Where groups overlap, several have trained on the task: its own is the one that it was put into.
            return next((name for name, tasks in self.grouping.groups.items() if task in tasks), "-")
        return next((member.name for member in self.ensemble.members if task in member.tasks), "-")

    def result_rows(self) -> list[dict[str, Any]]:
        """One row per task, then their mean: accuracy and loss of ensemble and baseline."""
        systems = self.results.get(self.shown_split, {})
        ensemble, baseline = systems.get("ensemble", {}), systems.get("baseline", {})
        rows = [
            {"task": task, "group": self.group_of(task), "ensemble": ensemble[task], "baseline": baseline.get(task)}
            for task in ensemble
        ]
        if rows:

            def mean(scores: dict) -> dict[str, float]:
                return {m: sum(s[m] for s in scores.values()) / len(scores) for m in ("accuracy", "loss")}

            means = {"ensemble": mean(ensemble), "baseline": mean(baseline) if baseline else None}
            rows.append({"task": "**mean**", "group": "", **means})
        return rows

    def card_data(self) -> ModelCardData:
        """The card's metadata block."""
        base = self.ensemble.base_model.name_or_path
        data = ModelCardData(
            # A local folder is no model id that the Hub could link to.
            base_model=base if base and not Path(base).is_absolute() and not Path(base).exists() else None,
            library_name="peft",
            tags=["hf-ensemble", "ensemble", "lora"],
        )
        systems = self.results.get(self.shown_split, {})
        if "ensemble" in systems:
            data.model_name = "ensemble"
            data.eval_results = [
                EvalResult(
                    task_type="text-generation" if self.ensemble.label_space is None else "text-classification",
                    dataset_type=task,
                    dataset_name=task,
                    dataset_split=self.shown_split,
                    metric_type="accuracy",
                    metric_value=round(score["accuracy"], 4),
                )
                for task, score in systems["ensemble"].items()
            ]
        return data


def public_name(name: str | None) -> str | None:
    """A Hub id as it is, and the last part of a folder's path: a card does not tell the paths of a machine."""
    return Path(name).name if name and Path(name).is_absolute() else name


def _public(value: Any) -> Any:
    """A configuration with [`public_name`] applied to every string in it."""
    if isinstance(value, dict):
        return {key: _public(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_public(entry) for entry in value]
    return public_name(value) if isinstance(value, str) else value


def write_model_card(run: str | Path, repo_id: str | None = None) -> Path:
    """Render the card of a run's ensemble to `ensemble/README.md`, with its pictures in `ensemble/assets`.

    Args:
        run (`str` or `Path`): a trainer's `output_dir`.
        repo_id (`str`, *optional*): the repository that the loading snippet names.

    Returns:
        `Path`: the card.

    Raises:
        `EnsembleLoadError`: when the run holds no ensemble.
    """
    run = Path(run)
    data = EnsembleCardData.from_run(run)
    if data.grouping is not None and len(data.grouping.task_names) > 1:
        assets = run / "ensemble" / "assets"
        try:
            drawn = draw_choice(data.grouping, assets, ("png",))
            data.pictures = [f"assets/{picture.name}" for picture in drawn]
        except Exception:  # a picture that cannot be drawn (fonts, backends) must not cost a finished training its card
            logger.warning("The pictures of the groups could not be drawn.", exc_info=True)
    template = resources.files("hf_ensemble.model_cards") / TEMPLATE
    card = ModelCard.from_template(
        data.card_data(),
        template_str=template.read_text(encoding="utf-8"),
        data=data,
        load_from=repo_id or "path/or/user/repository",
    )
    path = run / "ensemble" / "README.md"
    write_atomically(path, lambda file: file.write(str(card).encode()))
    return path


def require_ensemble(run: Path) -> None:
    """Raise `EnsembleLoadError` when a run holds no complete ensemble."""
    config = SavedEnsembleConfig.load(run / "ensemble")
    for member in config.members:
        if not (run / "ensemble" / "adapters" / member.name / "adapter_model.safetensors").is_file():
            raise EnsembleLoadError(f"Adapter {member.name!r} is missing from {str(run / 'ensemble')!r}.")
