"""Mixed precision, as trainers and accelerate name it."""

import contextlib

import torch

from ..errors import ConfigurationError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device | str, mixed_precision: str) -> contextlib.AbstractContextManager:
    """The autocast that a trainer with this mixed precision runs its forwards in.

    Args:
        device (`torch.device` or `str`): where the model is.
        mixed_precision (`str`): `"no"` (nothing is cast), `"bf16"` or `"fp16"`.

    Raises:
        `ConfigurationError`: for another precision.
    """
    if mixed_precision == "no":
        return contextlib.nullcontext()
    if mixed_precision not in _DTYPES:
        raise ConfigurationError(f"Expected mixed_precision 'no', 'bf16' or 'fp16', found {mixed_precision!r}.")
    return torch.autocast(torch.device(device).type, dtype=_DTYPES[mixed_precision])
