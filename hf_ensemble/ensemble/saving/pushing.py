"""Uploading saved ensembles and adapters: what they consist of and nothing beside it."""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitInfo

from ..._cards import CARD, CardParts, given_metadata, joined_cards, read_card, updated_card
from ..._files import read_json, write_json
from ..._hub import Repository, push_folder
from ...errors import CardError
from ...logging import get_logger
from .card import is_hub_id, saved_card
from .ensemble_config import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ADAPTERS_FOLDER,
    CONFIG_NAME,
    ROUTER_WEIGHTS,
    SavedEnsembleConfig,
)

logger = get_logger(__name__)

ASSETS = "assets"
# Pictures of cards; others in the same folder of a repository are its owner's.
PICTURES = tuple(
    f"{ASSETS}/{name}.png"
    for name in (
        *("affinity", "groups", "cost_curve", "mixtures", "fidelity", "predictions"),
        *("selection_path", "weights"),
    )
)
_ADAPTER = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
# Of all members; other files beside them, such as notes, are their author's.
_MEMBERS = tuple(f"{ADAPTERS_FOLDER}/*/{name}" for name in _ADAPTER)
# Folders beside the files at the root; tokenizers keep templates with names in the second.
_FOLDERS = (ASSETS, "additional_chat_templates")
# Files of a trainer that are no part of what it has made.
_LEFT_OUT = ("training_args.bin",)


def push_ensemble(
    folder: Path,
    config: SavedEnsembleConfig,
    repository: Repository,
    card: CardParts | None = None,
    again: str = "push_to_hub()",
) -> CommitInfo:
    """Upload a saved ensemble in place of what an ensemble or adapter has in the repository, see [`push_folder`].

    Args:
        folder (`Path`): the saved ensemble.
        config (`SavedEnsembleConfig`): what lies there.
        repository (`Repository`): where to push to.
        card (`CardParts`, *optional*): what the card is made of; that of the saved ensemble by default.
        again (`str`): how to push again, for messages.
    """
    base = config.base_model.name_or_path
    if base and not is_hub_id(base):
        _warn_of_local_base(base, repository.repo_id)
        # Not its last part either, which another machine would take for a model of its own.
        base = ""
    with tempfile.TemporaryDirectory() as work:
        target = Path(work)
        copy_files(folder, target)
        for member in config.members:
            copy_adapter(folder / ADAPTERS_FOLDER / member.name, target / ADAPTERS_FOLDER / member.name, base)
        dataclasses.replace(config, base_model=dataclasses.replace(config.base_model, name_or_path=base)).save(target)
        parts = saved_card(folder, config, repository.repo_id) if card is None else card
        replaced = (*_MEMBERS, ROUTER_WEIGHTS, *_ADAPTER, *PICTURES)
        return push_folder(repository, target, replaced, card_maker(folder / CARD, parts), again)


def push_adapter(
    folder: Path,
    repository: Repository,
    base: str,
    card: CardParts,
    again: str = "push_to_hub()",
    local_card: Path | None = None,
) -> CommitInfo:
    """Upload one saved adapter with its card in place of what an ensemble has in the repository, see [`push_folder`].

    Args:
        folder (`Path`): the saved adapter, with whatever else is uploaded beside it.
        repository (`Repository`): where to push to.
        base (`str`): name of the base model.
        card (`CardParts`): what the card is made of.
        again (`str`): how to push again, for messages.
        local_card (`Path`, *optional*): the card on this machine, whose own text is kept; the folder's by default.
    """
    if base and not is_hub_id(base):
        _warn_of_local_base(base, repository.repo_id)
        base = ""
    with tempfile.TemporaryDirectory() as work:
        target = Path(work)
        copy_files(folder, target)
        copy_adapter(folder, target, base)
        replaced = (*_MEMBERS, ROUTER_WEIGHTS, CONFIG_NAME, *PICTURES)
        return push_folder(repository, target, replaced, card_maker(local_card or folder / CARD, card), again)


def card_maker(path: Path, parts: CardParts) -> Callable[[str | None], str]:
    """Makes the Hub's card from the one that is there, the local one and a new generated part."""

    def make(existing: str | None) -> str:
        try:
            local = read_card(path)
            given = {**given_metadata(local), **parts.given}
            return updated_card(joined_cards(local, existing), parts.metadata, parts.body, given)
        except CardError:
            if existing is None:
                # It is the local card that cannot be read: the Hub gets a new one.
                return updated_card(None, *parts)
            raise

    return make


def _warn_of_local_base(base: str, repo_id: str) -> None:
    logger.warning(
        "The base model is the local folder %r: anyone loading %r must pass base_model=. To avoid that, push the base "
        "model to the Hub and train from there.",
        base,
        repo_id,
    )


def copy_files(folder: Path, target: Path) -> None:
    """The files at the root of a folder, its pictures and its chat templates."""
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith(".") and path.name not in _LEFT_OUT:
            shutil.copy(path, target / path.name)
    for name in _FOLDERS:
        if (folder / name).is_dir():
            shutil.copytree(folder / name, target / name)


def copy_adapter(folder: Path, target: Path, base: str) -> None:
    """The two files of an adapter, which names another base model."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / ADAPTER_WEIGHTS, target)
    config = read_json(folder / ADAPTER_CONFIG)
    config["base_model_name_or_path"] = base or None
    write_json(target / ADAPTER_CONFIG, config)
