"""Typed, versioned records: frozen dataclasses kept as JSON files."""

import dataclasses
import hashlib
import json
import math
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, Self, Union, get_args, get_origin, get_type_hints

from ._files import read_json, write_json
from .errors import RecordError

_REMEDY = "Delete it and run the step that writes it again."
# Beside the fields, a file holds the checksum of its content and, where it belongs to one, the run's identity.
_CHECKSUM, _RUN = "checksum", "run"
# Metadata of a dataclass field that is not written to files; it needs a default.
NOT_KEPT = {"kept": False}
_PLAIN = {str: "a string", bool: "true or false", int: "an integer", float: "a number"}


class Record:
    """Base of the frozen dataclasses that are kept as JSON files.

    A subclass states its `format` and raises `format_version` whenever its fields change. Fields may be strings,
    numbers, lists, tuples, dicts, other dataclasses, and unions of these: [`Record.load`] rebuilds them from the type
    hints. Numbers that are not finite become null where the field allows `None`. Fields with [`NOT_KEPT`] as metadata
    are left out.

    Example:

    ```python
    >>> @dataclass(frozen=True)
    ... class Score(Record):
    ...     format = "hf_ensemble.score"
    ...     loss: float

    >>> Score(0.5).save("score.json")  # doctest: +SKIP
    >>> Score.load("score.json")  # doctest: +SKIP
    Score(loss=0.5)
    ```
    """

    format: ClassVar[str]
    format_version: ClassVar[int] = 1

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, after the format and its version.

        Raises:
            `RecordError`: for a value that has no JSON form, and for a number that is not finite where `None` is not
            allowed.
        """
        return {"format": self.format, "format_version": self.format_version, **_fields_to_json(self, "")}

    def save(self, path: str | Path, run: str | None = None) -> None:
        """Write as JSON with a checksum, whole or not at all.

        Args:
            path (`str` or `Path`): the file.
            run (`str`, *optional*): identity of the run that the record belongs to.
        """
        belongs = {} if run is None else {_RUN: run}
        write_json(Path(path), with_checksum({**self.to_dict(), **belongs}))

    @classmethod
    def load(cls, path: str | Path, run: str | None = None) -> Self:
        """Read what [`Record.save`] wrote.

        Args:
            path (`str` or `Path`): the file.
            run (`str`, *optional*): identity of the run that the record has to belong to; any by default.

        Raises:
            `RecordError`: for a missing, unreadable or altered file, for one of another run, and for what
                [`Record.from_dict`] refuses.
        """
        path = Path(path)
        try:
            data = read_json(path)
        except FileNotFoundError as error:
            raise RecordError(
                f"{str(path)!r} does not exist: expected a file of format {cls.format!r}. Check the path, or run the "
                "step that writes it."
            ) from error
        except OSError as error:
            raise RecordError(
                f"{str(path)!r} cannot be read: {error.strerror or error}. Check the path and its permissions."
            ) from error
        record = cls.from_dict(data, str(path))
        check_checksum(data, str(path))
        if run is not None and data.get(_RUN) != run:
            raise RecordError(
                f"{str(path)!r} belongs to another run, or to this one before its configuration changed. {_REMEDY}"
            )
        return record

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Self:
        """Rebuild a record from [`Record.to_dict`].

        Args:
            data (`dict`): parsed JSON.
            where (`str`): what error messages call the source, such as its path.

        Raises:
            `RecordError`:
                For another format, a missing or newer version, missing or unknown fields, and values of the wrong type.
        """
        if not isinstance(data, Mapping):
            _refuse(where, f"expected an object of format {cls.format!r}, found {_named(data)}")
        if data.get("format") != cls.format:
            raise RecordError(
                f"{where!r} has format {data.get('format')!r}; expected {cls.format!r}. Check the path, or run the "
                "step that writes it again."
            )
        version = data.get("format_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            _refuse(where, f"expected a format_version from 1 to {cls.format_version}, found {version!r}")
        if version > cls.format_version:
            raise RecordError(
                f"{where!r} has format version {version}, this release reads up to {cls.format_version}. Upgrade "
                "hf_ensemble."
            )
        fields = {key: value for key, value in data.items() if key not in ("format", "format_version", _CHECKSUM, _RUN)}
        try:
            return _dataclass_from_json(fields, cls, "")
        except _Mismatch as error:
            _refuse(where, str(error), error)


def with_checksum(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON data and, as the last entry, a checksum of it, which [`check_checksum`] checks."""
    return {**data, _CHECKSUM: _checksum(data)}


def check_checksum(data: Mapping[str, Any], where: str, remedy: str = _REMEDY) -> None:
    """Make sure that JSON data are as they were written.

    Raises:
        `RecordError`: for data that were altered, or that have no checksum.
    """
    if data.get(_CHECKSUM) != _checksum(data):
        found = "was altered since it was written" if _CHECKSUM in data else "has no checksum"
        raise RecordError(f"{where!r} {found}. {remedy}")


def _checksum(data: Mapping[str, Any]) -> str:
    return digest_of({key: value for key, value in data.items() if key != _CHECKSUM})


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, the same before it is written and after it is read."""
    # Keys become strings and tuples lists before they are sorted.
    value = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class _Mismatch(ValueError):
    """A JSON value that a type hint does not allow."""


def _refuse(where: str, reason: str, cause: Exception | None = None) -> NoReturn:
    raise RecordError(f"{where!r} cannot be used: {reason}. {_REMEDY}") from cause


def _named(value: Any) -> str:
    """A JSON value as messages show it, at most a line of it."""
    kind = {dict: "an object", list: "a list"}.get(type(value))
    text = repr(value)
    return kind or (text if len(text) <= 60 else f"{text[:57]}...")


def _fields_to_json(record: Any, name: str) -> dict[str, Any]:
    hints = get_type_hints(type(record))
    return {
        field.name: _to_json(getattr(record, field.name), hints[field.name], f"{name}{field.name}")
        for field in _kept_fields(type(record))
    }


def _kept_fields(cls: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(cls) if field.metadata.get("kept", True)]


def _to_json(value: Any, hint: Any, name: str) -> Any:
    if hasattr(value, "tolist"):
        # NumPy's arrays and scalars.
        value = value.tolist()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        if any(member in (Any, types.NoneType) for member in _members(hint)):
            return None
        raise RecordError(f"{name} has to be finite, found {value}.")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields_to_json(value, f"{name}.")
    if isinstance(value, Mapping):
        own = _item_hint(hint, Mapping, 1)
        return {str(key): _to_json(item, own, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item, _item_hint(hint, Sequence, i), f"{name}[{i}]") for i, item in enumerate(value)]
    raise RecordError(f"{name} has no JSON form: found a {type(value).__name__}.")


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; of any other hint, itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _item_hint(hint: Any, container: type, index: int) -> Any:
    """The hint of a container's item, among the alternatives of `hint`."""
    for member in _members(hint):
        origin, args = get_origin(member), get_args(member)
        if isinstance(origin, type) and issubclass(origin, container):
            return args[index] if index < len(args) and args[index] is not Ellipsis else args[0]
    return Any


def _from_json(value: Any, hint: Any, name: str) -> Any:
    if hint is Any:
        return value
    members = [member for member in _members(hint) if member is not types.NoneType]
    if value is None and len(members) < len(_members(hint)):
        return None
    if len(members) > 1:
        for member in members:
            try:
                return _from_json(value, member, name)
            except _Mismatch:
                continue
        raise _Mismatch(f"{name!r} holds {_named(value)}, which none of its types allows")
    return _one_from_json(value, members[0], name)


def _one_from_json(value: Any, hint: Any, name: str) -> Any:
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin is Literal:
        if value not in args:
            raise _Mismatch(f"{name!r} should be one of {args}, found {_named(value)}")
        return value
    if origin in _PLAIN:
        allowed = float | int if origin is float else origin
        if not isinstance(value, allowed) or (isinstance(value, bool) and origin is not bool):
            raise _Mismatch(f"{name!r} should be {_PLAIN[origin]}, found {_named(value)}")
        return value
    if dataclasses.is_dataclass(origin):
        if not isinstance(value, Mapping):
            raise _Mismatch(f"{name!r} should be an object, found {_named(value)}")
        return _dataclass_from_json(value, origin, f"{name}.")
    if issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _Mismatch(f"{name!r} should be an object, found {_named(value)}")
        key_hint, item_hint = args or (str, Any)
        return {
            _key_from_json(key, key_hint, name): _from_json(item, item_hint, f"{name}[{key!r}]")
            for key, item in value.items()
        }
    if not isinstance(value, list):
        raise _Mismatch(f"{name!r} should be a list, found {_named(value)}")
    if origin is tuple and args and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise _Mismatch(f"{name!r} should have {len(args)} items, found {len(value)}")
        return tuple(_from_json(item, own, f"{name}[{i}]") for i, (item, own) in enumerate(zip(value, args)))
    items = [_from_json(item, args[0] if args else Any, f"{name}[{i}]") for i, item in enumerate(value)]
    return tuple(items) if origin is tuple else items


def _key_from_json(key: str, hint: Any, name: str) -> Any:
    """JSON has string keys alone."""
    if hint is not int:
        return key
    try:
        return int(key)
    except ValueError as error:
        raise _Mismatch(f"{name!r} should have integers as keys, found {key!r}") from error


def _dataclass_from_json(data: Mapping[str, Any], cls: type, name: str) -> Any:
    fields = [field.name for field in _kept_fields(cls)]
    missing = [field for field in fields if field not in data]
    unknown = [key for key in data if key not in fields]
    if missing or unknown:
        found = [f"{what} fields {keys}" for what, keys in (("missing", missing), ("unknown", unknown)) if keys]
        raise _Mismatch(f"{repr(name.rstrip('.')) + ' has ' if name else ''}{' and '.join(found)}")
    hints = get_type_hints(cls)
    values = {field: _from_json(data[field], hints[field], f"{name}{field}") for field in fields}
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise _Mismatch(f"{repr(name.rstrip('.')) + ': ' if name else ''}{str(error).rstrip('.')}") from error
