"""The library's logger: transformers' own, so that one verbosity setting rules both."""

from transformers.utils import logging


def get_logger(name: str):
    """Logger under transformers' verbosity (`transformers.logging.set_verbosity_info()`)."""
    return logging.get_logger(name)
