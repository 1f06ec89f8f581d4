"""Ensembles on disk and on the Hub: a configuration beside plain PEFT adapters."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftModel
from torch import nn

from .._files import write_folder_atomically
from ..errors import EnsembleLoadError
from .config import ADAPTERS_FOLDER, BaseModelReference, SavedEnsembleConfig

_AUTO_CLASSES = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
}
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


def base_reference(model: PeftModel) -> BaseModelReference:
    """Name, revision and auto class of a model's base.

    Raises:
        `EnsembleLoadError`: for a class that no auto class loads.
    """
    base = model.get_base_model()
    name = type(base).__name__
    auto_class = next((auto for suffix, auto in _AUTO_CLASSES.items() if name.endswith(suffix)), None)
    if auto_class is None:
        raise EnsembleLoadError(f"{name} is of no class that an ensemble can load again: {sorted(_AUTO_CLASSES)}.")
    path = base.config._name_or_path or ""
    is_classifier = auto_class == "AutoModelForSequenceClassification"
    return BaseModelReference(
        # A folder is found again from wherever the ensemble is loaded.
        name_or_path=str(Path(path).resolve()) if path and Path(path).is_dir() else path,
        revision=getattr(base.config, "_commit_hash", None),
        auto_class=auto_class,
        num_labels=base.config.num_labels if is_classifier else None,
    )


def save_adapter(model: PeftModel, name: str, folder: Path) -> None:
    """Write one adapter as plain PEFT files into `folder`, whole or not at all."""

    def write(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            # PEFT writes an adapter of another name than "default" into a folder of that name, beside a card.
            model.save_pretrained(work, selected_adapters=[name], safe_serialization=True)
            source = Path(work) if name == "default" else Path(work) / name
            for file in (_ADAPTER_CONFIG, _ADAPTER_WEIGHTS):
                shutil.copy(source / file, target / file)

    write_folder_atomically(folder, write)


def save_ensemble(folder: Path, model: PeftModel, config: SavedEnsembleConfig) -> None:
    """Write the adapters, then the configuration that makes the folder an ensemble."""
    folder.mkdir(parents=True, exist_ok=True)
    for member in config.members:
        save_adapter(model, member.name, folder / ADAPTERS_FOLDER / member.name)
    config.save(folder)


def check_adapter_config(path: Path, name: str) -> None:
    """Refuse what would make PEFT read more than this folder, before PEFT sees it.

    Raises:
        `EnsembleLoadError`: for a damaged file, an adapter that is not LoRA, and fields that name other files or code.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        peft_type = config["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise EnsembleLoadError(f"Adapter {name!r}: {path.name} is damaged: {error!r}.") from error
    if peft_type != "LORA":
        raise EnsembleLoadError(f"Adapter {name!r}: {path.name} says {peft_type!r}; members of an ensemble are LORA.")
    if config.get("megatron_config"):
        raise EnsembleLoadError(f"Adapter {name!r}: {path.name} sets megatron_config, which an ensemble does not read.")


def load_adapter(model: "PeftModel | nn.Module", folder: Path, name: str) -> PeftModel:
    """Put one adapter of a folder on a base model, or beside the adapters that it has, frozen.

    Raises:
        `EnsembleLoadError`: for missing files and for weights that do not fit the model.
    """
    for file in (_ADAPTER_CONFIG, _ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            raise EnsembleLoadError(f"Adapter {name!r}: {file} is missing from {str(folder)!r}.")
    check_adapter_config(folder / _ADAPTER_CONFIG, name)
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=False)
    except Exception as error:  # safetensors, peft and torch each raise their own classes for damaged or foreign files
        raise EnsembleLoadError(f"Adapter {name!r} in {str(folder)!r} does not fit the base model: {error}") from error
    return model


def load_ensemble(
    name_or_path: str,
    revision: str | None,
    base_model: "str | nn.Module | None",
    token: str | None,
    model_kwargs: dict[str, Any],
) -> tuple[PeftModel, SavedEnsembleConfig]:
    """Base model with all adapters, and the configuration; see `PeftEnsembleModel.from_pretrained`."""
    folder = local_folder(name_or_path, revision, token)
    config = SavedEnsembleConfig.load(folder)
    if base_model is None and not Path(name_or_path).is_dir() and Path(config.base_model.name_or_path).is_absolute():
        raise EnsembleLoadError(
            f"{name_or_path!r} names the base model {config.base_model.name_or_path!r}, a folder of another machine. "
            "Pass base_model=."
        )
    if not config.members:
        raise EnsembleLoadError(f"The ensemble in {name_or_path!r} has no member.")
    model = base_model if isinstance(base_model, nn.Module) else _load_base(config, base_model, token, model_kwargs)
    for member in config.members:
        model = load_adapter(model, folder / ADAPTERS_FOLDER / member.name, member.name)
    return model, config


def local_folder(name_or_path: str, revision: str | None, token: str | None) -> Path:
    """A folder itself, or the snapshot of a Hub id: configuration and safetensors, no pickle, no code."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        patterns = ["*.json", "*.safetensors", f"{ADAPTERS_FOLDER}/*/*.json", f"{ADAPTERS_FOLDER}/*/*.safetensors"]
        return Path(snapshot_download(name_or_path, revision=revision, token=token, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise EnsembleLoadError(f"{name_or_path!r} is neither a folder nor a repository to be had: {error}") from error


def _load_base(
    config: SavedEnsembleConfig, override: str | None, token: str | None, model_kwargs: dict[str, Any]
) -> nn.Module:
    reference = config.base_model
    if reference.auto_class not in _AUTO_CLASSES.values():
        raise EnsembleLoadError(f"The ensemble names the unknown model class {reference.auto_class!r}.")
    name = override or reference.name_or_path
    if not name:
        raise EnsembleLoadError("The ensemble does not name its base model. Pass base_model=.")
    kwargs = dict(model_kwargs)
    if override is None and reference.revision is not None:
        kwargs.setdefault("revision", reference.revision)
    if reference.num_labels is not None:
        kwargs.setdefault("num_labels", reference.num_labels)
    try:
        return getattr(transformers, reference.auto_class).from_pretrained(
            name, token=token, use_safetensors=True, **kwargs
        )
    except OSError as error:
        raise EnsembleLoadError(
            f"The base model {name!r} cannot be loaded: {error} Pass base_model= where it lies elsewhere."
        ) from error
