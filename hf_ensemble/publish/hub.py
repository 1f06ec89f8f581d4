"""Uploading an ensemble."""

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers.trainer import TRAINING_ARGS_NAME

from .._files import read_json, write_json
from ..ensemble.saving.ensemble_config import ADAPTERS_FOLDER, SavedEnsembleConfig
from ..logging import get_logger
from ..runs import RunDirectory
from .card import require_ensemble, write_model_card

logger = get_logger(__name__)


def push_ensemble_to_hub(
    run: str | Path,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str | None = "Upload ensemble",
    revision: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> CommitInfo:
    """Upload a run's ensemble: plain PEFT adapters, `ensemble_config.json`, model card and pictures.

    Args:
        run (`str` or `Path`): a trainer's `output_dir`.
        repo_id (`str`): repository; created where it does not exist.
        token (`str`, *optional*): Hub token.
        private (`bool`, *optional*): of a new repository.
        commit_message (`str`, *optional*): of the commit.
        revision (`str`, *optional*): branch to commit to; created where it does not exist.
        metadata (`dict`, *optional*): for the card, see [`write_model_card`].

    Raises:
        `EnsembleLoadError`: when the run holds no complete ensemble.
    """
    config = require_ensemble(RunDirectory(run))
    base = config.base_model.name_or_path
    if Path(base).is_absolute():
        logger.warning(
            "The base model is the local folder %r: anyone loading %r must pass base_model=. To avoid that, push the "
            "base model to the Hub and train from there.",
            base,
            repo_id,
        )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    card = write_model_card(run, repo_id, metadata=metadata)
    with tempfile.TemporaryDirectory() as work:
        _copy_public(card.parent, Path(work), config)
        return api.upload_folder(repo_id=repo_id, folder_path=work, commit_message=commit_message, revision=revision)


def _copy_public(ensemble: Path, target: Path, config: SavedEnsembleConfig) -> None:
    """What an ensemble consists of and nothing beside it, without the paths of this machine."""
    base = config.base_model.name_or_path
    if Path(base).is_absolute():
        # Not its last part either, which another machine would take for a model of its own.
        base = ""
    for path in ensemble.iterdir():
        if path.is_file() and not path.name.startswith(".") and path.name != TRAINING_ARGS_NAME:
            shutil.copy(path, target / path.name)
    if (ensemble / "assets").is_dir():
        shutil.copytree(ensemble / "assets", target / "assets")
    for member in config.members:
        folder = target / ADAPTERS_FOLDER / member.name
        folder.mkdir(parents=True)
        source = ensemble / ADAPTERS_FOLDER / member.name
        shutil.copy(source / "adapter_model.safetensors", folder)
        adapter = read_json(source / "adapter_config.json")
        adapter["base_model_name_or_path"] = base or None
        write_json(folder / "adapter_config.json", adapter)
    dataclasses.replace(config, base_model=dataclasses.replace(config.base_model, name_or_path=base)).save(target)
