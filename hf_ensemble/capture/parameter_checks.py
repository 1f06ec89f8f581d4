"""Trained parameters whose gradient would not be there: shared out over devices, or used by no example."""

from collections.abc import Collection, Mapping

from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import CaptureError


def check_whole(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise `CaptureError` for a parameter of which this process holds a shard: FSDP, ZeRO-3, tensor parallelism."""
    sharded = [
        name
        for name, parameter in parameters.items()
        if isinstance(parameter.data, DTensor) or hasattr(parameter, "ds_id") or hasattr(parameter, "_local_shard")
    ]
    if sharded:
        raise CaptureError(
            f"{len(sharded)} trained parameters are sharded over devices, among them {sharded[0]!r}: no process has a "
            "whole gradient of them. Capture before the model is sharded, or on one device."
        )


def check_reached(model: nn.Module, parameters: Collection[str], reached: Collection[str]) -> None:
    """Raise `CaptureError` for trained parameters that no example of a batch depends on.

    Their features would be zero without a word: an adapter that is not active, a head that another one stands in for.
    A gradient of zeros, as a LoRA's A has at B = 0, is a dependence. Members of a module list do not count where the
    same parameter of another member is reached: experts are chosen by the data, and zero is their exact gradient.
    """
    missing = [name for name in parameters if name not in reached and not _has_reached_sibling(model, name, reached)]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise CaptureError(
            f"Expected every trained parameter to take part in the model's output; {len(missing)} do not: {shown}. Set "
            "their adapter active, or freeze them with requires_grad_(False)."
        )


def _has_reached_sibling(model: nn.Module, name: str, reached: Collection[str]) -> bool:
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit() and isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList):
            before, after = ".".join((*parts[:i], "")), "." + ".".join(parts[i + 1 :])
            if any(
                other.startswith(before) and other.endswith(after) and other[len(before) : -len(after)].isdigit()
                for other in reached
            ):
                return True
    return False
