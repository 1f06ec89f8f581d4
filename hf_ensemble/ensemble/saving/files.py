"""Ensembles on disk: a configuration and plain PEFT adapters."""

import contextlib
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig

from ..._cards import CARD
from ..._compat import tied_modules_under_adapters, tokens_of_their_own_adapters
from ..._files import remove_leftovers, write_folder_atomically, write_json, writing
from ...errors import EnsembleLoadError
from ..members import BaseModelReference
from .adapter_check import check_adapter
from .adapter_tensors import embedding_layers
from .auto_classes import AUTO_CLASSES, CLASSIFIER, auto_class_of
from .card import write_saved_card
from .ensemble_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTERS_FOLDER, SavedEnsembleConfig
from .loading import check_loading, download_options, load_base, local_folder
from .untrusted import read_object
from .vocabulary import fit_vocabulary, resized_embeddings


def base_reference(model: PeftModel) -> BaseModelReference:
    """Name, revision and auto class of a model's base.

    Raises:
        `EnsembleLoadError`: for a class without an auto class.
    """
    base = model.get_base_model()
    name, auto_class = type(base).__name__, auto_class_of(base)
    if auto_class is None:
        raise EnsembleLoadError(
            f"Expected a causal language model, an encoder-decoder or a sequence classifier, whose class ends in one "
            f"of {sorted(AUTO_CLASSES)}; found {name}. Load the base model with one of "
            f"{sorted(set(AUTO_CLASSES.values()))}."
        )
    path = base.config._name_or_path or ""
    is_classifier = auto_class == CLASSIFIER
    return BaseModelReference(
        # The ensemble may be loaded from another working directory.
        name_or_path=str(Path(path).resolve()) if path and Path(path).is_dir() else path,
        revision=getattr(base.config, "_commit_hash", None),
        auto_class=auto_class,
        num_labels=base.config.num_labels if is_classifier else None,
        pad_token_id=getattr(base.config.get_text_config(), "pad_token_id", None) if is_classifier else None,
        label_head=getattr(base, "made_of", None),
        labels=_label_names(base.config) if is_classifier else None,
        problem_type=getattr(base.config, "problem_type", None) if is_classifier else None,
    )


def loaded_base(saved: BaseModelReference, model: PeftModel) -> BaseModelReference:
    """The base that an ensemble names, at the place where the one of its model was loaded from.

    The place that it was saved with may be gone. Where both have the same name, the revision is the saved one.
    """
    base = model.get_base_model()
    own = None if auto_class_of(base) is None else base_reference(model)
    if own is None or own.name_or_path in ("", saved.name_or_path):
        return saved
    return replace(saved, name_or_path=own.name_or_path, revision=own.revision)


def _label_names(config: PreTrainedConfig) -> list[str] | None:
    """What a classifier's outputs are called; `None` for transformers' own names."""
    names = [str(config.id2label.get(number)) for number in range(config.num_labels)]
    return None if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names


def save_adapter(model: PeftModel, name: str, folder: Path) -> None:
    """Write one adapter as plain PEFT files into `folder`, completely or not at all."""

    def write(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".peft.", suffix=".tmp") as work:
            # PEFT writes adapters not named "default" into a folder of their name, and a card beside it.
            with tokens_of_their_own_adapters():
                model.save_pretrained(work, selected_adapters=[name], save_embedding_layers=False)
            source = Path(work) if name == "default" else Path(work) / name
            config, own = read_object(source / ADAPTER_CONFIG, f"Adapter {name!r}"), model.peft_config[name]
            # PEFT writes sets in an order that changes from process to process, and with it the file's checksum.
            config |= {key: sorted(value) for key, value in config.items() if isinstance(getattr(own, key, None), set)}
            if _is_tied_in_name_only(model, name):
                config["ensure_weight_tying"] = False
            write_json(target / ADAPTER_CONFIG, config)
            embeddings = resized_embeddings(model, [name])
            if embeddings:
                tensors = {**load_file(source / ADAPTER_WEIGHTS), **embeddings}
                save_file(tensors, target / ADAPTER_WEIGHTS, metadata={"format": "pt"})
            else:
                shutil.copy(source / ADAPTER_WEIGHTS, target / ADAPTER_WEIGHTS)
        if (folder / CARD).is_file():
            shutil.copy(folder / CARD, target / CARD)

    write_folder_atomically(folder, write)


def _is_tied_in_name_only(model: PeftModel, name: str) -> bool:
    """Whether an adapter asks for tied embeddings that PEFT has not tied, as it does for a second one on a model."""
    layers = embedding_layers(model.get_base_model())
    if not getattr(model.peft_config[name], "ensure_weight_tying", False) or len(layers) < 2:
        return False
    holds = [
        isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and name in layer._get_available_adapters()
        for layer in layers
    ]
    return holds[0] and not holds[1]


def save_ensemble(folder: Path, model: PeftModel, config: SavedEnsembleConfig) -> None:
    """Write the adapters, then the configuration that makes the folder an ensemble.

    Adapters of an ensemble that was saved there before, and that this one lacks, are deleted.
    """
    for work in (folder, folder / ADAPTERS_FOLDER):
        remove_leftovers(work)
    previous: list[str] = []
    with contextlib.suppress(EnsembleLoadError):
        previous = [member.name for member in SavedEnsembleConfig.load(folder).members]
    for member in config.members:
        save_adapter(model, member.name, folder / ADAPTERS_FOLDER / member.name)
    config.save(folder)
    for name in set(previous) - {member.name for member in config.members}:
        _delete_adapter(folder / ADAPTERS_FOLDER / name)
    write_saved_card(folder, config)


def _delete_adapter(folder: Path) -> None:
    """Delete an adapter's files, and its folder unless something else lies there."""
    with writing(folder):
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def load_adapter(model: "PeftModel | nn.Module", folder: Path, name: str, root: Path | None = None) -> PeftModel:
    """Add the adapter in a folder to a base model or a `PeftModel`, frozen.

    Args:
        model (`nn.Module`): a base model, or a `PeftModel`.
        folder (`Path`): folder of the adapter.
        name (`str`): name to give it.
        root (`Path`, *optional*): folder outside of which nothing is read; `folder` by default.

    Raises:
        `EnsembleLoadError`: for missing, damaged or hostile files, and for weights that do not fit the model, which is
        left as it was.
    """
    peft_model = model if isinstance(model, PeftModel) else None
    base = model if peft_model is None else peft_model.get_base_model()
    check_adapter(folder, name, base, root or folder)
    loaded = peft_model
    try:
        with tied_modules_under_adapters(), tokens_of_their_own_adapters():
            if peft_model is None:
                loaded = PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=False)
            else:
                peft_model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
        _check_complete(loaded, folder / ADAPTER_WEIGHTS, name)
    except Exception as error:  # PEFT, transformers and torch raise various classes for adapters that do not fit
        _take_off(model, peft_model, name)
        if isinstance(error, EnsembleLoadError):
            raise
        raise EnsembleLoadError(f"Adapter {name!r} in {str(folder)!r} does not fit the base model: {error}") from error
    return loaded


def _check_complete(model: PeftModel, weights: Path, name: str) -> None:
    """PEFT silently leaves tensors that a file lacks at their initial values."""
    with tokens_of_their_own_adapters():
        expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    with safe_open(weights, framework="pt") as file:
        found = set(file.keys())
    lacking = sorted(set(expected) - found)
    if lacking:
        raise EnsembleLoadError(
            f"Adapter {name!r}: {weights.name} lacks {len(lacking)} tensors that {ADAPTER_CONFIG} asks for, such as "
            f"{lacking[0]!r}."
        )


def _take_off(model: nn.Module, peft_model: PeftModel | None, name: str) -> None:
    """Undo a failed load."""
    if peft_model is not None:
        if name in peft_model.peft_config:
            peft_model.delete_adapter(name)
        return
    for path, module in list(model.named_modules()):
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            wrapped = isinstance(module, AuxiliaryTrainingWrapper)
            parent, _, child = path.rpartition(".")
            plain = module.original_module if wrapped else module.get_base_layer()
            setattr(model.get_submodule(parent), child, plain)
    # PEFT also keeps the configurations on the base model, and would believe the name to be taken.
    if hasattr(model, "peft_config"):
        del model.peft_config


def load_ensemble(
    name_or_path: str,
    revision: str | None,
    base_model: "str | nn.Module | None",
    token: str | None,
    model_kwargs: dict[str, Any],
    subfolder: str = "",
) -> tuple[PeftModel, SavedEnsembleConfig]:
    """Base model with all adapters, and the configuration; see `PeftEnsembleModel.from_pretrained`."""
    check_loading(base_model, model_kwargs)
    folder = local_folder(name_or_path, revision, token, subfolder, **download_options(model_kwargs))
    config = SavedEnsembleConfig.load(folder)
    if base_model is None and not Path(name_or_path).is_dir() and Path(config.base_model.name_or_path).is_absolute():
        raise EnsembleLoadError(
            f"{name_or_path!r} names the base model {config.base_model.name_or_path!r}, a folder on another machine. "
            "Pass base_model=."
        )
    folders = {member.name: folder / ADAPTERS_FOLDER / member.name for member in config.members}
    model: Any = base_model
    if not isinstance(base_model, nn.Module):
        model = load_base(config.base_model, base_model, token, model_kwargs)
        fit_vocabulary(model, folders, folder)
    for name, own in folders.items():
        config.check_adapter_files(name, folder)
        model = load_adapter(model, own, name, folder)
    return model, config
