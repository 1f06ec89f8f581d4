"""Identity of a model: what its gradients depend on, as comparable JSON values."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .._values import plain_values
from ..models.sharding import whole_tensor

_SAMPLES = 64
# The source and version of an adapter do not change its gradients.
_IGNORED_ADAPTER_FIELDS = ("inference_mode", "peft_version", "base_model_name_or_path", "revision", "auto_mapping")


def model_identity(model: nn.Module) -> dict[str, Any]:
    """Name, revision, adapter configuration and weight fingerprints of a model.

    The trainable parameters (theta0) are hashed completely. All other tensors are hashed at 64 evenly spaced entries,
    which is enough to detect another checkpoint and cheap for large models. Those of a sharded base are gathered one by
    one, for which every process has to call this.
    """
    config = getattr(model, "config", None)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # The parameters themselves: a copy does not know that ZeRO-3 has cut it.
    state = model.state_dict(keep_vars=True)
    frozen = {name: t for name, t in state.items() if torch.is_tensor(t) and name not in trainable}
    name = getattr(config, "_name_or_path", None) or type(model).__name__
    return {
        # Elsewhere, a relative path could be taken for a name on the Hub.
        "name": f"./{name}" if _is_relative_folder(name) else name,
        "revision": getattr(config, "_commit_hash", None),
        "adapter": _adapter_configs(model),
        "theta0": parameter_fingerprint(trainable),
        "base_weights": _hash(frozen, samples=_SAMPLES),
    }


def _is_relative_folder(name: str) -> bool:
    return not os.path.isabs(name) and not name.startswith(".") and os.path.isdir(name)


def parameter_fingerprint(parameters: Mapping[str, torch.Tensor]) -> str:
    """32 hexadecimal digits that depend on every entry of named tensors."""
    return _hash(parameters, samples=None)


def _adapter_configs(model: nn.Module) -> dict[str, Any]:
    configs = {}
    for name in getattr(model, "active_adapters", []) if hasattr(model, "peft_config") else []:
        raw = model.peft_config[name].to_dict()
        configs[name] = plain_values(
            {key: value for key, value in raw.items() if value is not None and key not in _IGNORED_ADAPTER_FIELDS},
            other=str,
        )
    return configs


def _hash(tensors: Mapping[str, torch.Tensor], samples: int | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        whole = whole_tensor(tensor)
        flat = whole.reshape(-1)
        if samples is not None and flat.numel() > samples:
            # Integer arithmetic: float32 cannot index the entries of a large embedding.
            flat = flat[torch.arange(samples, device=flat.device) * (flat.numel() - 1) // (samples - 1)]
        digest.update(f"{name} {tensor.dtype} {tuple(whole.shape)}".encode())
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
