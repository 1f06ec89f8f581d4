"""Looking at a model as it is, whatever wraps it and whichever mode it is in."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import extract_model_from_parallel
from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without its distributed and compiled wrappers, whose names and hooks are not the model's own."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off while open; every module's own mode is restored, also after an exception."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
