"""A model without its wrappers, and in evaluation mode."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import extract_model_from_parallel
from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without distributed and compiled wrappers, which have names and hooks of their own."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """While open, dropout is off; each module's own mode is restored, also after an exception."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
