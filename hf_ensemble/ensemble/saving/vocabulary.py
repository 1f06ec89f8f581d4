"""Embeddings of a base model whose vocabulary was resized: they travel in the adapters' files, as PEFT has it."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig

from ...logging import get_logger
from .adapter_check import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from .adapter_tensors import PREFIX, embedding_layers, plain_module, split_key
from .untrusted import checked_file

logger = get_logger(__name__)


def resized_embeddings(model: PeftModel, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Embeddings and output layer of the base model, by the names under which PEFT reads them beside an adapter.

    Without them no one could load an adapter whose base got new tokens. Those that the adapter has a copy of its own
    of are left out.

    Args:
        model (`PeftModel`): holds the adapters.
        names (`Sequence[str]`): the adapter's name; of a merged one, those that it is merged from.

    Returns:
        `dict[str, torch.Tensor]`: empty where the vocabulary is that of the base model's checkpoint.
    """
    base = model.get_base_model()
    if not is_resized(base):
        return {}
    paths = {module: path for path, module in base.named_modules()}
    tensors: dict[str, torch.Tensor] = {}
    found: set[int] = set()
    for layer in embedding_layers(base):
        if isinstance(layer, ModulesToSaveWrapper) and any(name in layer.modules_to_save for name in names):
            continue
        module = plain_module(base, paths[layer])
        for key, value in module.state_dict(keep_vars=True).items():
            if id(value) not in found:  # tied ones once
                found.add(id(value))
                tensors[f"{PREFIX}{paths[layer]}.{_inner_path(layer, names)}{key}"] = value.detach()
    return tensors


def fit_vocabulary(base: nn.Module, folders: Mapping[str, Path], root: Path | None = None) -> None:
    """Resize the vocabulary of a base model that was just loaded to that of its adapters' embeddings.

    New tokens get the rows that the first file holds for them. Whether all files hold the same rows is checked when
    they are loaded.

    Args:
        base (`nn.Module`): the base model, without adapters.
        folders (`dict[str, Path]`): the adapters' folders by name.
        root (`Path`, *optional*): folder outside of which nothing is read; each adapter's own by default.

    Raises:
        `EnsembleLoadError`: for an adapter whose files are missing or lead out of the folder.
    """
    layers = embedding_layers(base)
    if not layers:
        return
    before = layers[0].weight.shape[0]
    rows: dict[int, torch.Tensor] = {}
    for name, folder in folders.items():
        for file_name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            file = checked_file(folder / file_name, root or folder, f"Adapter {name!r}")
        for position, tensor in _embeddings_of(file, base, layers):
            rows.setdefault(position, tensor)
    sizes = {len(tensor) for tensor in rows.values()} - {before}
    if len(sizes) != 1:
        return
    base.resize_token_embeddings(sizes.pop(), mean_resizing=False)
    with torch.no_grad():
        for position, layer in enumerate(embedding_layers(base)):
            if position in rows:
                layer.weight[before:] = rows[position][before:].to(layer.weight)


def _embeddings_of(path: Path, base: nn.Module, layers: list[nn.Module]) -> Iterator[tuple[int, torch.Tensor]]:
    """Which of the layers a file has a weight for, and the weight."""
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                module_path, part = split_key(key)
                module = None if part else plain_module(base, module_path.removesuffix(".weight"))
                if module in layers and len(file.get_slice(key).get_shape()) == 2:
                    tensor = file.get_tensor(key)
                    if tensor.is_floating_point() and tensor.shape[1] == module.weight.shape[1]:
                        yield layers.index(module), tensor
    except (SafetensorError, OSError):
        return  # The check of the adapter names what is wrong.


def _inner_path(layer: nn.Module, names: Sequence[str]) -> str:
    """Where PEFT keeps the plain module within the adapter's layers, once it is loaded alone."""
    if not isinstance(layer, (TrainableTokensWrapper, BaseTunerLayer)):
        return ""
    if not set(names) & set(layer._get_available_adapters()):
        return ""
    return "token_adapter.base_layer." if isinstance(layer, TrainableTokensWrapper) else "base_layer."


def saved_vocabulary(shapes: Mapping[str, Sequence[int]], config: PeftConfig) -> int | None:
    """The number of tokens of the embeddings that an adapter's file holds beside its own tensors.

    Args:
        shapes (`dict[str, Sequence[int]]`): shapes of the file's tensors by name.
        config (`PeftConfig`): the adapter's.

    Returns:
        `int`, *optional*: `None` where the file holds no embeddings of a resized base.
    """
    saved = tuple(getattr(config, "modules_to_save", None) or ())
    for key, shape in shapes.items():
        path, part = split_key(key)
        if part or not key.startswith(PREFIX) or not key.endswith(".weight") or len(shape) != 2:
            continue
        ancestors = accumulate(path.removesuffix(".weight").split("."), "{}.{}".format)
        if not any(ancestor.endswith(saved) for ancestor in ancestors):
            return shape[0]
    return None


def is_resized(base: nn.Module) -> bool:
    """Whether a base model has another vocabulary than the checkpoint that it was loaded from."""
    config = getattr(base, "config", None)
    name = getattr(config, "_name_or_path", None)
    if not name or not hasattr(base, "get_input_embeddings"):
        return False
    original = _original_config(config, name)
    if original is None:
        logger.warning_once(
            f"The configuration of the base model {name!r} is found no more: its vocabulary is taken not to have been "
            "resized. If it was, embeddings of new tokens are not saved. Put the model back where it was loaded from."
        )
        return False
    sizes = [getattr(own.get_text_config(), "vocab_size", None) for own in (config, original)]
    return sizes[0] != sizes[1]


def _original_config(config: PreTrainedConfig, name: str) -> PreTrainedConfig | None:
    """What a model's configuration was when it was loaded; `None` where that is gone."""
    # Most were loaded from this machine. A cache of another folder is not known here, and the Hub is asked.
    for is_local in (True, False):
        with contextlib.suppress(OSError, ValueError):
            revision = getattr(config, "_commit_hash", None)
            return type(config).from_pretrained(name, revision=revision, local_files_only=is_local)
    return None
