"""Checks of an adapter's files before PEFT reads them: an adapter for this base, finite, and nothing else."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import nn

from ...errors import EnsembleLoadError
from ..adapter_kinds import LAYER_TENSORS, SHARED_TENSORS, adapter_obstacle
from .adapter_tensors import check_tensor, replaced_modules, split_key
from .ensemble_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from .untrusted import checked_file, read_object

_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_MAX_PATTERN = 1000
# Fields that PEFT allocates by, and what is small for any of them.
_SIZES = ("r", "n_frequency", "oft_block_size", "boft_block_size", "boft_block_num", "boft_n_butterfly_factor")
_SIZES += ("block_size", "decompose_factor")
# Fields with one of these, or one of the factors of an adapter's output, for each of some modules.
_SIZE_PATTERNS = ("rank_pattern", "n_frequency_pattern", "block_size_pattern")
_SCALINGS = ("lora_alpha", "alpha", "scaling")
_PLAIN_SIZE = 256
# PEFT wraps embeddings for single tokens' rows whatever the adapter's type.
_OF_ALL_KINDS = ("token_adapter.trainable_tokens_delta",)


def check_adapter(folder: Path, name: str, base: nn.Module, root: Path) -> dict[str, Any]:
    """Refuse a damaged, hostile or foreign adapter before PEFT sees it.

    Args:
        folder (`Path`): holds the adapter's two files.
        name (`str`): adapter name, for messages.
        base (`nn.Module`): the base model, with or without adapters.
        root (`Path`): folder outside of which nothing is read.

    Returns:
        `dict`: the content of `adapter_config.json`.

    Raises:
        `EnsembleLoadError`: naming file and fault.
    """
    what = f"Adapter {name!r}"
    config_file = checked_file(folder / ADAPTER_CONFIG, root, what)
    weights_file = checked_file(folder / ADAPTER_WEIGHTS, root, what)
    config = read_object(config_file, what)
    check_config(config, what)
    _check_weights(weights_file, config, base, what)
    return config


def check_config(config: Mapping[str, Any], what: str) -> None:
    """Check the fields of `adapter_config.json` that decide what PEFT does with it."""

    def refuse(text: str) -> None:
        raise EnsembleLoadError(f"{what}: {ADAPTER_CONFIG} {text}.")

    if "peft_type" not in config:
        refuse("is damaged: it has no peft_type")
    obstacle = adapter_obstacle(config)
    if obstacle is not None:
        refuse(obstacle)
    sizes = [("rank", "r", config.get("r", 8))]
    for name in _SIZE_PATTERNS:
        what_is = "rank" if name == "rank_pattern" else "size"
        sizes += [(what_is, f"{name} of {key!r}", size) for key, size in _pattern(config, name, refuse).items()]
    for what_is, key, size in sizes:
        # OFT states either the number of blocks or their size, and 0 for the other.
        if not isinstance(size, int) or isinstance(size, bool) or size < (0 if _kind(config) == "OFT" else 1):
            refuse(f"has the {what_is} {size!r} ({key}), expected an integer above 0")
    scalings = {key: config[key] for key in _SCALINGS if key in config}
    for key, scaling in {**scalings, **_pattern(config, "alpha_pattern", refuse)}.items():
        if not isinstance(scaling, (int, float)) or isinstance(scaling, bool) or not math.isfinite(scaling):
            refuse(f"has the scaling {scaling!r} ({key}), expected a finite number")
    for key in ("target_modules", "feedforward_modules", "modules_to_save", "exclude_modules"):
        value = config.get(key)
        texts = [value] if isinstance(value, str) else value or []
        if not isinstance(texts, list) or not all(isinstance(t, str) and 0 < len(t) <= _MAX_PATTERN for t in texts):
            refuse(f"has {key} {value!r:.80}, expected names of modules")


def _pattern(config: Mapping[str, Any], key: str, refuse) -> dict[str, Any]:
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict) or any(len(k) > _MAX_PATTERN for k in pattern):
        refuse(f"has {key} {pattern!r:.80}, expected numbers by names of modules")
    return pattern


def _check_weights(path: Path, config: Mapping[str, Any], base: nn.Module, what: str) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
            dtypes = {key: file.get_slice(key).get_dtype() for key in keys}
            _check_ranks(shapes, config, path, what)
            saved = replaced_modules(config, base)
            kind = _kind(config)
            _check_sizes(shapes, config, path, what)
            for key in keys:
                _check_part(key, kind, f"{what}: {path.name}")
                shared = key in SHARED_TENSORS.get(kind, ())
                _check_one(file, key, shapes[key], dtypes[key], saved, None if shared else base, f"{what}: {path.name}")
            _check_pairs(keys, f"{what}: {path.name}")
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, EnsembleLoadError):
            raise
        raise EnsembleLoadError(f"{what}: {path.name} does not hold safetensors: {error}") from error


def _kind(config: Mapping[str, Any]) -> str:
    return str(getattr(config["peft_type"], "value", config["peft_type"]))


def _check_part(key: str, kind: str, what: str) -> None:
    part = split_key(key)[1]
    if part and part not in LAYER_TENSORS[kind] and part not in _OF_ALL_KINDS:
        raise EnsembleLoadError(f"{what}: tensor {key!r} does not belong in an adapter of the type {kind!r}.")


def _check_sizes(shapes: Mapping[str, tuple], config: Mapping[str, Any], path: Path, what: str) -> None:
    """Check that no size that PEFT allocates by is above what the file, or the base's layers, can hold."""
    if _kind(config) in ("LORA", "IA3"):
        return
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    stated = [(key, config.get(key)) for key in _SIZES]
    stated += [(f"{name} of {key!r}", own) for name in _SIZE_PATTERNS for key, own in (config.get(name) or {}).items()]
    for key, value in stated:
        if isinstance(value, int) and value > max(largest, _PLAIN_SIZE):
            raise EnsembleLoadError(
                f"{what}: {ADAPTER_CONFIG} states {key} {value}, and no tensor of {path.name} has more than {largest} "
                "rows or columns."
            )


def _check_one(file, key: str, shape: tuple, dtype: str, saved: tuple, base: nn.Module | None, what: str) -> None:
    if dtype not in _FLOATS:
        raise EnsembleLoadError(f"{what}: tensor {key!r} has the dtype {dtype}, expected one of {sorted(_FLOATS)}.")
    own = None if base is None else check_tensor(base, key, shape, saved, what)
    values = file.get_tensor(key)
    if not bool(values.isfinite().all()):
        raise EnsembleLoadError(f"{what}: tensor {key!r} has values that are not finite.")
    if own is not None and not _is_same(own.detach(), values):
        raise EnsembleLoadError(
            f"{what}: tensor {key!r} would replace weights of the base model, which all adapters share."
        )


def _is_same(own: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether these are the same weights, in the precision of the coarser ones."""
    return torch.equal(own.to(values), values) or torch.equal(own, values.to(own))


def _check_ranks(shapes: Mapping[str, tuple], config: Mapping[str, Any], path: Path, what: str) -> None:
    """Check that the stated ranks are those of the tensors, so that PEFT allocates little more than the file holds."""
    ranks = {}
    for key, shape in shapes.items():
        module, part = split_key(key)
        if part in ("lora_A.weight", "lora_embedding_A") and shape:
            ranks[module] = shape[0]
    patterns = config.get("rank_pattern") or {}
    bare = bool(config.get("target_parameters"))
    for module, found in ranks.items():
        stated = patterns.get(get_pattern_key(patterns.keys(), module), config.get("r", 8))
        if stated != found and not (bare and found % stated == 0):
            raise EnsembleLoadError(
                f"{what}: {path.name} has rank {found} at {module!r}, where {ADAPTER_CONFIG} says {stated}."
            )
    # A rank that no module of the file has may be that of others, which PEFT would make room for.
    largest, highest = max(ranks.values(), default=0), max(config.get("r", 8), *patterns.values(), 0)
    if ranks and highest > max(largest, _PLAIN_SIZE):
        raise EnsembleLoadError(
            f"{what}: {ADAPTER_CONFIG} states the rank {highest}, above any of {path.name}, whose largest is {largest}."
        )


def _check_pairs(keys: list[str], what: str) -> None:
    parts: dict[str, set[str]] = {}
    for key in keys:
        module, part = split_key(key)
        parts.setdefault(module, set()).add(part)
    for module, own in parts.items():
        for one, other in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if (one in own) != (other in own):
                lacking = other if one in own else one
                raise EnsembleLoadError(f"{what}: the tensor {f'{module}.{lacking}'!r} is missing.")
