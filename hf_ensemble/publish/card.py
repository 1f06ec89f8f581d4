"""The model cards of a run: what was trained on what, chosen by what, and how well it does."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .._cards import CARD, CardParts, render, update_card_file
from .._files import remove_leftovers
from ..ensemble.saving.card import (
    adapter_loading,
    adapter_metadata,
    ensemble_loading,
    ensemble_metadata,
    reporting_failed_card,
)
from ..ensemble.saving.ensemble_config import ADAPTER_CONFIG, SavedEnsembleConfig
from ..ensemble.saving.pushing import ASSETS
from ..errors import EnsembleLoadError
from ..logging import get_logger
from ..runs import RunDirectory
from ..select import Selection
from .card_data import EnsembleCardData, RunCardData, SelectionCardData
from .choice_pictures import draw_choice
from .pictures import fidelity_picture, prediction_picture

logger = get_logger(__name__)

# What each picture shows, for readers who do not see it.
_CAPTIONS = {
    "affinity": "Predicted affinity of the tasks, ordered by group",
    "groups": "Predicted loss against the number of groups",
    "cost_curve": "Predicted and expected loss against the cost of training",
    "mixtures": "What each adapter is trained on",
    "fidelity": "Predicted against true losses of subsets that were fine-tuned for real",
    "predictions": "Predicted loss of each task in its group against the ensemble's measured one",
    "selection_path": "Predicted loss of the target after each step of the selection",
    "weights": "How often rows of each task are drawn",
}


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
    """Write the card of a run's ensemble, or of its selection's adapter, beside it, with its pictures in `assets`.

    A card that is there already is updated: what is not between its two marks stays, and so do entries of the metadata
    block that were added or changed by hand.

    Args:
        run (`str` or `Path`): a trainer's `output_dir`.
        repo_id (`str`, *optional*): the repository that the code in the card loads from; the folder by default.
        folder (`str` or `Path`, *optional*):
            Where the ensemble or adapter lies; by default the run's ensemble, or its adapter where it has none.
        metadata (`dict`, *optional*): further entries of the metadata block, which stay when the card is written
            again; `tags` and `datasets` are added to the card's own.

    Returns:
        `Path`: the card.

    Raises:
        `EnsembleLoadError`: when the run holds neither an ensemble nor a selection's adapter.
        `RecordError`: when a record of the run is damaged.
        `CardError`: for a card that is there and cannot be read; it stays as it is.
    """
    directory = RunDirectory(run)
    place = Path(folder or made_folder(directory))
    return update_card_file(place / CARD, *card_parts(directory, repo_id, place, metadata))


def made_folder(run: RunDirectory) -> Path:
    """The folder of what a run has made: its ensemble, or its adapter where it has none."""
    return run.adapter if is_adapter(run.adapter) and not run.ensemble.is_dir() else run.ensemble


def is_adapter(folder: Path) -> bool:
    """Whether a selection's adapter lies in a folder."""
    return (folder / ADAPTER_CONFIG).is_file()


def card_parts(
    run: RunDirectory, repo_id: str | None, folder: Path, metadata: Mapping[str, Any] | None = None
) -> CardParts:
    """What a card is made of, with its pictures drawn; see [`write_model_card`]."""
    parts = (_selection_parts if is_adapter(folder) else _ensemble_parts)(run, repo_id, folder)
    return parts._replace(given=metadata or {})


def _ensemble_parts(run: RunDirectory, repo_id: str | None, folder: Path) -> CardParts:
    data = EnsembleCardData.from_run(run, folder)
    predictions = data.predicted_and_true()
    drawings: dict[str, Callable[[Path], Any]] = {}
    if len(predictions) > 1:
        drawings["predictions"] = lambda path: prediction_picture(predictions, path)
    chosen = data.grouping if data.grouping is not None and len(data.grouping.task_names) > 1 else None
    _draw(data, folder, chosen, drawings)
    return render_ensemble(data, folder, repo_id)


def render_ensemble(data: EnsembleCardData, folder: Path, repo_id: str | None = None) -> CardParts:
    """What the card of an ensemble that lies in a folder is made of."""
    loading = ensemble_loading(data.ensemble, folder, repo_id, data.examples)
    body = render("ensemble_card.md.jinja", data=data, ensemble=data.ensemble, loading=loading, captions=_CAPTIONS)
    return CardParts({**ensemble_metadata(data.ensemble, folder), **data.metadata("ensemble", "ensemble")}, body)


def _selection_parts(run: RunDirectory, repo_id: str | None, folder: Path) -> CardParts:
    require_selection(run, folder)
    data = SelectionCardData.from_run(run, folder)
    _draw(data, folder, data.selection, {})
    examples = {task: data.examples.get(task, f"A prompt of {task}") for task in data.selection.targets}
    loading = adapter_loading(folder, data.base_model, examples, repo_id)
    body = render("selection_card.md.jinja", data=data, loading=loading, captions=_CAPTIONS)
    is_sft = "SFT" in data.configuration.get("configuration", {}).get("trainer", "")
    tags = ["hf-ensemble", "data-selection", *(["trl", "sft"] if is_sft else [])]
    return CardParts({**adapter_metadata(data.base_model, tags), **data.metadata("selection", "adapter")}, body)


def _draw(data: RunCardData, folder: Path, choice: Any, drawings: Mapping[str, Callable[[Path], Any]]) -> None:
    """Draw the pictures and name those that were drawn: one that cannot be (fonts, backends) costs no card."""
    assets, report = folder / ASSETS, data.fidelity
    remove_leftovers(assets)
    steps = dict(drawings)
    if report is not None:
        steps["fidelity"] = lambda path: fidelity_picture(report, path)
    if choice is not None:
        _draw_one(lambda: draw_choice(choice, assets, ("png",)), data)
    for name, draw in steps.items():
        _draw_one(lambda name=name, draw=draw: [draw(assets / f"{name}.png") or assets / f"{name}.png"], data)


def _draw_one(draw: Callable[[], list[Path]], data: RunCardData) -> None:
    try:
        data.pictures |= {path.stem: f"{ASSETS}/{path.name}" for path in draw()}
    except Exception as error:
        logger.warning("A picture of the model card could not be drawn: %s: %s", type(error).__name__, error)


def require_ensemble(folder: Path) -> SavedEnsembleConfig:
    """The configuration of the ensemble that lies in a folder, with all of its adapters.

    Raises:
        `EnsembleLoadError`: when the folder holds no complete ensemble, or a damaged one.
    """
    config = SavedEnsembleConfig.load(folder)
    for member in config.members:
        config.check_adapter_files(member.name, folder)
    return config


def require_selection(run: RunDirectory, folder: Path) -> None:
    """Check that an adapter can be a selection's.

    Raises:
        `EnsembleLoadError`: for an adapter beside a run without a selection.
    """
    if not run.has(Selection):
        raise EnsembleLoadError(
            f"Expected an ensemble in {str(folder)!r}, found a single adapter, and the run in {str(run.path)!r} has "
            "made no selection that it could be of. Pass the folder of the ensemble, or load the adapter with PEFT and "
            "push it."
        )


def renew_model_card(run: RunDirectory, folder: Path) -> None:
    """[`write_model_card`], where a card that cannot be written is reported and stops nothing."""
    with reporting_failed_card(folder):
        write_model_card(run.path, folder=folder)
