"""What the settings dataclasses of all stages share."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from .errors import ConfigurationError


class Settings:
    """Base of settings that are used alone or mixed into a subclass of `TrainingArguments`.

    A subclass checks its own fields in `__post_init__` and ends with `super().__post_init__()`, which leads on to the
    next mixin and at last to `TrainingArguments`.
    """

    def __post_init__(self):
        following = getattr(super(), "__post_init__", None)
        if following is not None:
            following()


def check_one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise `ConfigurationError` for a value that is not among those allowed."""
    if value not in allowed:
        raise ConfigurationError(f"{name} has to be one of {tuple(allowed)}, found {value!r}.")


def check_at_least(name: str, value: Any, least: int, optional: bool = False) -> None:
    """Raise `ConfigurationError` for anything but an integer of at least `least`, or `None` where it is `optional`."""
    if optional and value is None:
        return
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ConfigurationError(f"{name} has to be {expected}{' or None' if optional else ''}, found {value!r}.")


def check_fraction(name: str, value: Any) -> None:
    """Raise `ConfigurationError` for anything but a number between 0 and 1, both excluded."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < value < 1:
        raise ConfigurationError(f"{name} has to be a number between 0 and 1, found {value!r}.")
