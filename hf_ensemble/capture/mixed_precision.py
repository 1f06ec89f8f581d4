"""The precision that a capture's forward passes run in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def capture_precision(model: nn.Module, device: torch.device, mixed_precision: str) -> Iterator[None]:
    """While open, the model runs in `mixed_precision` instead of the precision that accelerate prepared it for.

    Accelerate wraps the forward of a model in training in its own autocast; the wrapper is put back afterwards.

    Args:
        model (`nn.Module`): model without distributed wrappers.
        device (`torch.device`): where the model runs.
        mixed_precision (`str`): `"bf16"`, or `"no"` to leave autocast as the caller set it.
    """
    wrapped, original = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    is_wrapped = wrapped is not None and original is not None
    try:
        if is_wrapped:
            model.forward = original
        if mixed_precision == "bf16":
            with torch.autocast(device.type, torch.bfloat16):
                yield
        else:
            yield
    finally:
        if is_wrapped:
            model.forward = wrapped
