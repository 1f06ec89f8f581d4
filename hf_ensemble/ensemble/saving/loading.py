"""Where an ensemble is loaded from: its folder or snapshot, and the base model."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from torch import nn

from ...errors import EnsembleLoadError
from ...models import LabelSimilarityForSequenceClassification
from ..members import BaseModelReference
from .auto_classes import AUTO_CLASSES
from .ensemble_config import ADAPTERS_FOLDER, CONFIG_NAME

# Arguments of `from_pretrained` that say how files are fetched from the Hub.
_OF_DOWNLOADS = ("cache_dir", "force_download", "local_files_only")


def check_loading(base_model: "str | nn.Module | None", model_kwargs: Mapping[str, Any]) -> None:
    """Raise [`EnsembleLoadError`] for arguments of a base model that is loaded already, and for pickled weights."""
    others = sorted(set(model_kwargs) - set(_OF_DOWNLOADS))
    if isinstance(base_model, nn.Module) and others:
        raise EnsembleLoadError(
            f"Expected no arguments to load the base model with beside base_model={type(base_model).__name__}(...), "
            f"which is loaded, found {others}. Load it with them, or pass its name."
        )
    if model_kwargs.get("use_safetensors") is False:
        raise EnsembleLoadError(
            "Base models are read from safetensors, since reading a pickle may run code; found use_safetensors=False. "
            "Leave it out, or load the base model yourself and pass it as base_model."
        )


def download_options(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments that load a base model, those that say how everything is fetched from the Hub."""
    return {name: model_kwargs[name] for name in _OF_DOWNLOADS if name in model_kwargs}


def local_folder(
    name_or_path: str, revision: str | None, token: str | None, subfolder: str = "", **options: Any
) -> Path:
    """The folder, or a snapshot of the Hub id: configurations and safetensors, no pickles, no code.

    Args:
        name_or_path (`str`): folder or Hub id.
        revision (`str`, *optional*): branch, tag or commit of a Hub id.
        token (`str`, *optional*): Hub token.
        subfolder (`str`): folder inside of it.
        options: see [`download_options`].

    Raises:
        `EnsembleLoadError`: for anything else, and for a subfolder that leads out of it.
    """
    parts = Path(subfolder).parts
    if Path(subfolder).is_absolute() or ".." in parts:
        raise EnsembleLoadError(f"The subfolder {subfolder!r} leads out of {name_or_path!r}.")
    if Path(name_or_path).is_dir():
        return Path(name_or_path, *parts)
    patterns = ["*.json", "*.safetensors", f"{ADAPTERS_FOLDER}/*/*.json", f"{ADAPTERS_FOLDER}/*/*.safetensors"]
    if parts:
        patterns = [f"{'/'.join(parts)}/*.json", f"{'/'.join(parts)}/*.safetensors"]
    try:
        snapshot = snapshot_download(name_or_path, revision=revision, token=token, allow_patterns=patterns, **options)
        return Path(snapshot, *parts)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise EnsembleLoadError(
            f"{name_or_path!r} is neither a folder nor a repository that can be downloaded: {error}"
        ) from error


def load_base(
    reference: BaseModelReference, override: str | None, token: str | None, model_kwargs: dict[str, Any]
) -> nn.Module:
    """The base model, from safetensors; code of its repository runs only with `trust_remote_code` in `model_kwargs`.

    Raises:
        `EnsembleLoadError`: for an unknown class, and for a base that cannot be loaded from safetensors.
    """
    if reference.auto_class not in AUTO_CLASSES.values():
        raise EnsembleLoadError(f"{CONFIG_NAME} names the unknown model class {reference.auto_class!r}.")
    name = override or reference.name_or_path
    if not name:
        raise EnsembleLoadError(
            "The ensemble does not name its base model: it was trained from a folder of another machine. Pass "
            "base_model=."
        )
    kwargs = {"trust_remote_code": False, **model_kwargs}
    if override is None and reference.revision is not None:
        kwargs.setdefault("revision", reference.revision)
    if reference.label_head is None:
        for key, value in _classifier_arguments(reference).items():
            kwargs.setdefault(key, value)
    kwargs |= {"token": token, "use_safetensors": True}
    try:
        if reference.label_head is not None:
            return LabelSimilarityForSequenceClassification.from_head(name, reference.label_head, **kwargs)
        return getattr(transformers, reference.auto_class).from_pretrained(name, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        raise EnsembleLoadError(
            f"The base model {name!r} cannot be loaded: {error} {_remedy(name, reference.auto_class, error)}"
        ) from error


def _remedy(name: str, auto_class: str, error: Exception) -> str:
    """What to do about a base model that cannot be loaded."""
    lacks_safetensors = re.search(r"file named \S*\.safetensors", str(error))
    if lacks_safetensors and (not Path(name).is_dir() or any(Path(name).glob("*.bin"))):
        return (
            "Pickled weights (.bin) are not read, since that may run code. Where it has no others, convert it with "
            f"transformers, {auto_class}.from_pretrained({name!r}).save_pretrained(FOLDER), save its tokenizer there "
            "too, and pass base_model=FOLDER."
        )
    return "Pass base_model= if it is somewhere else."


def _classifier_arguments(reference: BaseModelReference) -> dict[str, Any]:
    """What a classifier's configuration says beside its checkpoint's."""
    given = {key: getattr(reference, key) for key in ("num_labels", "pad_token_id", "problem_type")}
    found = {key: value for key, value in given.items() if value is not None}
    if reference.labels is not None:
        found["id2label"] = dict(enumerate(reference.labels))
        found["label2id"] = {name: number for number, name in enumerate(reference.labels)}
    return found
