"""Mixed precision, as trainers and accelerate name it."""

import contextlib

import torch

from .._settings import check_one_of

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MIXED_PRECISIONS = ("no", *_DTYPES)


def autocast(device: torch.device | str, mixed_precision: str) -> contextlib.AbstractContextManager:
    """The autocast that a trainer with this mixed precision runs its forwards in.

    Args:
        device (`torch.device` or `str`): where the model is.
        mixed_precision (`str`): `"no"` (nothing is cast), `"bf16"` or `"fp16"`.

    Raises:
        `ConfigurationError`: for another precision.
    """
    check_one_of("mixed_precision", mixed_precision, MIXED_PRECISIONS)
    if mixed_precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=_DTYPES[mixed_precision])
