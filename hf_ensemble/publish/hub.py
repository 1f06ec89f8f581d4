"""Uploading an ensemble."""

from pathlib import Path

from huggingface_hub import CommitInfo, HfApi

from ..ensemble.config import EnsembleConfig
from ..logging import get_logger
from .card import require_ensemble, write_model_card

logger = get_logger(__name__)


def push_ensemble_to_hub(
    run: str | Path,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload ensemble",
) -> CommitInfo:
    """Upload a run's ensemble: plain PEFT adapters, `ensemble_config.json`, model card and pictures.

    Args:
        run (`str` or `Path`): a trainer's `output_dir`.
        repo_id (`str`): repository; created where it does not exist.
        token (`str`, *optional*): Hub token.
        private (`bool`, *optional*): of a new repository.
        commit_message (`str`, *optional*): of the commit.

    Raises:
        `EnsembleLoadError`: when the run holds no complete ensemble.
    """
    run = Path(run)
    require_ensemble(run)
    base = EnsembleConfig.load(run / "ensemble").base_model.name_or_path
    if Path(base).is_dir():
        logger.warning(
            "The base model is the local folder %r: whoever loads %r has to pass base_model=. Push the base model to "
            "the Hub and train from there to spare them.",
            base,
            repo_id,
        )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    write_model_card(run, repo_id)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=run / "ensemble",
        commit_message=commit_message,
        ignore_patterns=[".*", "*.tmp"],
    )
