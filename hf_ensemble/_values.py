"""Values as JSON holds them, and what objects are known by."""

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from enum import Enum
from types import CodeType
from typing import Any


def _refused(value: Any) -> Any:
    raise TypeError(f"a {type(value).__name__} has no JSON form")


def plain_values(value: Any, other: Callable[[Any], Any] = _refused) -> Any:
    """Nested containers, arrays and tensors as the dicts, lists and scalars of JSON, with every entry.

    Args:
        value (`Any`): what to convert. Sets are sorted; keys become strings.
        other (`Callable`, *optional*): what to make of an object of another kind.

    Raises:
        `TypeError`: for an object of another kind, where `other` is not given.
    """
    if isinstance(value, Enum):
        value = value.value
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_values(entry, other) for key, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain_values(entry, other) for entry in value), key=str)
    if isinstance(value, (list, tuple)):
        return [plain_values(entry, other) for entry in value]
    if hasattr(value, "tolist"):
        # Arrays, tensors and their scalars; an array of objects holds further ones.
        return plain_values(value.tolist(), other)
    if isinstance(value, (bool, int, float, str)):
        return next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind))
    return other(value)


def is_number(value: Any) -> bool:
    """Whether a value is a plain number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def without_none(value: Any) -> Any:
    """Nested dicts without the keys that have no value, as tables fill in for rows that lack them."""
    if isinstance(value, Mapping):
        return {key: without_none(entry) for key, entry in value.items() if entry is not None}
    return [without_none(entry) for entry in value] if isinstance(value, list) else value


def identity_of(value: Any) -> Any:
    """What a value consists of, as JSON values that are the same in the next process.

    Classes are known by their names; functions by their source, defaults and what they close over; other objects by
    their class and their attributes.
    """
    return plain_values(value, _identity)


def _identity(value: Any) -> Any:
    if isinstance(value, type):
        return _name_of(value)
    if isinstance(value, functools.partial):
        return {"partial": identity_of(value.func), "args": identity_of([*value.args, value.keywords])}
    if inspect.ismethod(value):
        return {"method": _identity(value.__func__), "of": _identity(value.__self__)}
    if inspect.isfunction(value):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        held = [value.__defaults__, value.__kwdefaults__, cells]
        return {"function": _name_of(value), "source": _source_digest(value), "holds": plain_values(held, _name_of)}
    attributes = getattr(value, "__dict__", None)
    if not attributes:
        # A torch.dtype, a built-in function. What names no address is the same in the next process.
        text = str(value)
        return _name_of(value) if " at 0x" in text else text
    return {"class": _name_of(type(value)), "attributes": plain_values(attributes, _name_of)}


def _name_of(value: Any) -> str:
    own = value if hasattr(value, "__qualname__") else type(value)
    return f"{own.__module__}.{own.__qualname__}"


def _source_digest(function: Any) -> str:
    try:
        content = inspect.getsource(function).encode()
    except (OSError, TypeError):
        content = repr(_parts_of_code(function.__code__)).encode()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _parts_of_code(code: CodeType) -> tuple[Any, ...]:
    """What compiled code does, the same in every process: functions within it name an address in their `repr`."""

    def of(constant: Any) -> Any:
        if isinstance(constant, CodeType):
            return _parts_of_code(constant)
        if isinstance(constant, tuple):
            return tuple(map(of, constant))
        return sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant)

    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, of(code.co_consts)
