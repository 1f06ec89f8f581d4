"""Uploading what a run has made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo

from .._cards import CARD, CardParts
from .._hub import Repository
from .._settings import checked_path
from ..ensemble.saving.card import adapter_metadata, reporting_failed_card, saved_card
from ..ensemble.saving.pushing import push_adapter, push_ensemble
from ..errors import EnsembleLoadError
from ..runs import RunDirectory
from .card import card_parts, is_adapter, made_folder, require_ensemble, require_selection
from .card_data import SelectionCardData


def push_run_to_hub(
    run: str | Path,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    again: str | None = None,
) -> CommitInfo:
    """Upload a run's ensemble (plain PEFT adapters and `ensemble_config.json`) or its selection's adapter.

    The model card and its pictures go with it. Everything is one commit, which also deletes the members that the
    repository has and the ensemble lacks. The repository's card keeps what is not between its two marks. Connections
    that drop and errors of the Hub are tried again; a push that was interrupted leaves the repository as it was.

    Args:
        run (`str` or `Path`): a trainer's `output_dir`.
        repo_id (`str`): repository; created where it does not exist.
        token (`str`, *optional*): Hub token.
        private (`bool`, *optional*): of a new repository.
        commit_message (`str`, *optional*): of the commit.
        revision (`str`, *optional*):
            Branch to commit to, created where it does not exist; or `refs/pr/N`, a pull request that is open.
        metadata (`dict`, *optional*): for the card, see [`write_model_card`].
        folder (`str` or `Path`, *optional*):
            What to upload, such as a copy that `save_model` has made; by default the run's ensemble, or its adapter
            where it has none.
        again (`str`, *optional*): how messages call this upload; the call of this function by default.

    Raises:
        `EnsembleLoadError`: when the folder holds neither a complete ensemble nor the selection's adapter, such as a
            single adapter of an ensemble.
        `RecordError`: when a record of the run is damaged, or its adapter is not what it has trained.
        `PushError`: where the Hub refuses or cannot be reached; the message says how to go on.
    """
    directory = RunDirectory(run)
    again = again or f"push_run_to_hub({str(run)!r}, {repo_id!r})"
    message = commit_message or "Upload with hf_ensemble"
    repository = Repository(repo_id, token, private, message, revision=revision)
    folder = made_folder(directory) if folder is None else checked_path("folder", folder)
    is_own = folder.resolve() == directory.adapter.resolve()
    if not is_adapter(folder) and not is_own:
        config = require_ensemble(folder)
        parts = _parts(directory, repo_id, folder, metadata)
        if parts is None:
            with reporting_failed_card(folder):
                parts = saved_card(folder, config, repo_id)
        return push_ensemble(folder, config, repository, parts, again)
    if not is_adapter(folder):
        raise EnsembleLoadError(f"The run in {str(directory.path)!r} has not trained its adapter yet. Train it first.")
    require_selection(directory, folder)
    trained = directory.trained_adapter("adapter")
    # Without a record of its own it is the copy of another training; other folders are the caller's to vouch for.
    if trained is not None and is_own:
        trained.check_files(folder)
    base = SelectionCardData.from_run(directory, folder).base_model
    parts = _parts(directory, repo_id, folder, metadata)
    if parts is None:
        parts = CardParts(adapter_metadata(base, ["hf-ensemble"]), "# Adapter")
    return push_adapter(folder, repository, base.name_or_path, parts, again)


def _parts(run: RunDirectory, repo_id: str, folder: Path, metadata: Mapping[str, Any] | None) -> CardParts | None:
    """The card's parts; `None` where they cannot be made, which is reported and stops no upload."""
    with reporting_failed_card(folder / CARD):
        return card_parts(run, repo_id, folder, metadata)
    return None
