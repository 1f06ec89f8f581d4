"""Checks for trainable parameters without a usable gradient: sharded over devices, or unused by the examples."""

from collections.abc import Collection, Mapping

from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import CaptureError
from ..models.sharding import modules_sharded_together
from ..models.zero_sharding import cut_elsewhere


def check_not_sharded(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise `CaptureError` for parameters sharded by FSDP, ZeRO-3 or tensor parallelism."""
    sharded = [
        name
        for name, parameter in parameters.items()
        if isinstance(parameter.data, DTensor) or hasattr(parameter, "ds_id") or hasattr(parameter, "_local_shard")
    ]
    if sharded:
        raise CaptureError(
            f"{len(sharded)} trainable parameters are sharded over devices, among them {sharded[0]!r}, so no process "
            "has their full gradients. Leave the adapter out of the sharding (ignored_params of fully_shard), or "
            "capture before the model is sharded."
        )


def check_units(model: nn.Module) -> None:
    """Raise `CaptureError` for a base whose sharded modules do not have their weights in every backward."""
    together = modules_sharded_together(model)
    if together:
        raise CaptureError(
            f"Expected modules that fully_shard was given one by one, found several in one list: {together}. Shard "
            "each by itself; distributed_config shards the head with the last norm, so load the model without it."
        )
    cut = cut_elsewhere(model)
    if cut:
        raise CaptureError(
            f"Expected a base that FSDP2 shards, or that a trainer with deepspeed has loaded; found {len(cut)} "
            f"parameters that DeepSpeed has cut, among them {cut[0]!r}. Load the model before deepspeed is configured, "
            "and give the arguments with deepspeed to a trainer of hf_ensemble."
        )


def check_used(model: nn.Module, parameters: Collection[str], used: Collection[str]) -> None:
    """Raise `CaptureError` for trainable parameters that no example of a batch depends on.

    Their features would silently be zero: an inactive adapter, or a head that is replaced by another one. Parameters
    with a zero gradient, such as a LoRA's A at B = 0, count as used. Members of a module list are exempt if the same
    parameter of another member is used: experts are routed by the data, and zero is their exact gradient.
    """
    missing = [name for name in parameters if name not in used and not _has_used_sibling(model, name, used)]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise CaptureError(
            f"Expected the model's output to depend on every trainable parameter; {len(missing)} are unused: {shown}. "
            "Activate their adapter, or freeze them with requires_grad_(False)."
        )


def _has_used_sibling(model: nn.Module, name: str, used: Collection[str]) -> bool:
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit() and isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList):
            before, after = ".".join((*parts[:i], "")), "." + ".".join(parts[i + 1 :])
            if any(
                other.startswith(before) and other.endswith(after) and other[len(before) : -len(after)].isdigit()
                for other in used
            ):
                return True
    return False
