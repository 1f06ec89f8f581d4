"""Writing files so that a half-written one is never read as a whole one."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import RecordError


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Let `write` fill an open binary file, then rename it to `path`. A crash leaves the old file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders of a process that was killed while it wrote into a folder."""
    for path in [*folder.glob(".*.tmp"), *folder.glob(".*.tmp.old")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON, whole or not at all."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        `RecordError`: for a truncated or otherwise damaged file.
        `OSError`: for a file that is missing or cannot be opened.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(
            f"{str(path)!r} is truncated or not JSON: {error}. Delete it and run the step that writes it again."
        ) from error


def write_folder_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, then put it in the place of `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    try:
        os.chmod(work, 0o755)
        write(work)
        old = None
        if folder.exists():
            old = work.with_name(f"{work.name}.old")
            os.replace(folder, old)
        os.replace(work, folder)
        if old is not None:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def named_differences(found: Any, expected: Any, name: str = "") -> Iterator[str]:
    """Dotted names of the values in which two nested dicts differ, each with both values."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        for key in dict.fromkeys([*found, *expected]):
            yield from named_differences(found.get(key), expected.get(key), f"{name}.{key}" if name else str(key))
    elif found != expected:
        yield f"{name}: found {found!r}, expected {expected!r}"
