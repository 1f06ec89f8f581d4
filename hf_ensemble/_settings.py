"""What the settings dataclasses of all stages share, and the checks of single values."""

import importlib.util
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import inf, isfinite
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .errors import ConfigurationError, HfEnsembleError

_of_parent: ContextVar[bool] = ContextVar("of_parent", default=False)


class Settings:
    """Base of settings that are used alone or mixed into a subclass of `TrainingArguments`.

    A subclass checks its own fields in `__post_init__` and ends with `super().__post_init__()`, which leads on to the
    next mixin and at last to `TrainingArguments`.
    """

    def __post_init__(self):
        following = getattr(super(), "__post_init__", None)
        if following is not None:
            following()


def check_one_of(
    name: str, value: Any, allowed: Sequence[str], error: type[HfEnsembleError] = ConfigurationError
) -> None:
    """Raise `error` for a value that is not among those allowed."""
    if not isinstance(value, str) or value not in allowed:
        raise error(f"{name} has to be one of {tuple(allowed)}, found {value!r}.")


def check_flag(name: str, value: Any, error: type[HfEnsembleError] = ConfigurationError) -> None:
    """Raise `error` for anything but `True` and `False`."""
    if not isinstance(value, bool):
        raise error(f"{name} has to be True or False, found {value!r}.")


def check_at_least(
    name: str, value: Any, least: int, optional: bool = False, error: type[HfEnsembleError] = ConfigurationError
) -> None:
    """Raise `error` for anything but an integer of at least `least`, or `None` where it is `optional`."""
    if optional and value is None:
        return
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise error(f"{name} has to be {expected}{' or None' if optional else ''}, found {value!r}.")


def check_number(
    name: str,
    value: Any,
    least: float = -inf,
    most: float = inf,
    *,
    above: bool = False,
    optional: bool = False,
    error: type[HfEnsembleError] = ConfigurationError,
) -> None:
    """Raise `error` for anything but a finite number from `least` to `most`, or `None` where it is `optional`.

    Args:
        above (`bool`, *optional*, defaults to `False`): whether `least` itself is refused.
    """
    if optional and value is None:
        return
    is_number = isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
    if is_number and (value > least if above else value >= least) and value <= most:
        return
    lower = "" if least == -inf else f" above {least:g}" if above else f" of at least {least:g}"
    upper = "" if most == inf else f"{' and' if lower else ' of'} at most {most:g}"
    raise error(f"{name} has to be a finite number{lower}{upper}{' or None' if optional else ''}, found {value!r}.")


def check_device(name: str, value: Any) -> None:
    """Raise `ConfigurationError` for anything but a device that is there and has float64, by its name, or `None`."""
    if value is None:
        return
    import torch

    try:
        if torch.empty(0, dtype=torch.float64, device=value).is_meta:
            raise TypeError("it holds no values")
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(
            f"{name} has to be a device of this machine that has float64, such as 'cpu' or 'cuda', or None, found "
            f"{value!r} ({reason})."
        ) from error


def check_bitsandbytes() -> None:
    """Raise `ConfigurationError` where bitsandbytes, by which a base model is to be quantized, is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigurationError(
            "A base model is to be quantized by bitsandbytes, which is not installed. Run "
            "pip install 'hf-ensemble[quantization]', or leave the quantization out."
        )


def checked_names(
    what: str,
    names: Any,
    known: Collection[str],
    error: type[HfEnsembleError] = ConfigurationError,
) -> list[str]:
    """A name or several of them as a list.

    Raises:
        `HfEnsembleError`: of the kind `error`, for anything but names, unknown and repeated ones.
    """
    if isinstance(names, str):
        names = [names]
    found = list(names) if isinstance(names, Iterable) else [None]
    if not all(isinstance(name, str) for name in found):
        raise error(f"Expected {what} as a list of names, found {names!r:.80}; the tasks are {list(known)}.")
    unknown = sorted({name for name in found if name not in known})
    if unknown:
        raise error(f"Unknown {what} {unknown}; the tasks are {list(known)}.")
    if len(set(found)) < len(found):
        raise error(f"Expected different {what}, found {found}. Name each once.")
    return found


def check_options(
    function: Callable[..., Any], options: Mapping[str, Any], what: str, given: Collection[str] = ()
) -> None:
    """Raise `ConfigurationError` for options that are no optional arguments of a function, or `given` already."""
    parameters = inspect.signature(function).parameters.values()
    optional = [parameter.name for parameter in parameters if parameter.default is not inspect.Parameter.empty]
    known = [name for name in optional if name not in given]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigurationError(f"{what} takes no {unknown}; it takes {known or 'no further arguments'}.")


def checked_path(name: str, value: Any, error: type[HfEnsembleError] = ConfigurationError) -> Path:
    """A path.

    Raises:
        `HfEnsembleError`: of the kind `error`, for anything but the path of a file or folder.
    """
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise error(f"Expected {name} as a path, found {value!r:.60}.")
    return Path(value)


def checked_mapping(what: str, value: Any, error: type[HfEnsembleError] = ConfigurationError) -> Mapping[str, Any]:
    """A mapping whose keys are names.

    Raises:
        `HfEnsembleError`: of the kind `error`, for anything else.
    """
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise error(f"Expected {what} as a dict by name, found {value!r:.80}.")
    return value


def checked_shard(name: str, value: Any) -> tuple[int, int] | None:
    """Index and number of shards, which may be given as text, `"0/8"` to `"7/8"`; `None` for all of it, also as `0/1`.

    Raises:
        `ConfigurationError`: for anything else.
    """
    if value is None:
        return None
    index, count = -1, 0
    if isinstance(value, str) and re.fullmatch(r"[0-9]+/[0-9]+", value):
        index, count = map(int, value.split("/"))
    elif isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(own, Integral) for own in value):
        index, count = map(int, value)
    if not 0 <= index < count:
        raise ConfigurationError(f"Expected {name} as INDEX/COUNT, 0/8 to 7/8 as array jobs count, found {value!r}.")
    return None if count == 1 else (index, count)


@contextmanager
def taken_by_parent() -> Iterator[None]:
    """While open, configurations take any values of their parents' arguments: for trainers that are their parents."""
    token = _of_parent.set(True)
    try:
        yield
    finally:
        _of_parent.reset(token)


def checks_values() -> bool:
    """Whether a configuration refuses values of its parents' arguments that would fail in the middle of a run."""
    return not _of_parent.get()
