"""Writing files so that a half-written one is never read as a whole one."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import HfEnsembleError, RecordError, WriteError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
_IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY)


@contextmanager
def writing(path: Path, size: int | None = None) -> Iterator[None]:
    """While open, a full disk, missing permissions and things in the way raise one error that names `path`.

    Args:
        path (`Path`): the file or folder that is written.
        size (`int`, *optional*): how many bytes it will have, where that is known.

    Raises:
        `WriteError`: for what the file system refuses; other errors pass.
    """
    try:
        yield
    except HfEnsembleError:
        raise
    except Exception as error:
        reason = _refusal(path, _error_number(error), size) if _is_about(error, path) else None
        if reason is None:
            raise
        raise WriteError(f"{str(path)!r} cannot be written: {reason}") from error


def _is_about(error: Exception, path: Path) -> bool:
    """Whether an error is about a path or what lies beside or below it, as far as it says so."""
    named = getattr(error, "filename", None)
    if not isinstance(named, str):
        return True
    folder = path.absolute().parent
    return Path(named).absolute().is_relative_to(folder) or folder.is_relative_to(Path(named).absolute())


def _error_number(error: Exception) -> int | None:
    """Why the file system refused, also where a library wraps it in an exception of its own."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    # safetensors and tokenizers give the number in their text; torch.save says only where in it writing failed.
    text = str(error)
    found = re.search(r"os error (\d+)", text)
    if found is None and "inline_container" in text and "PytorchStreamReader" not in text:
        return errno.ENOSPC
    return None if found is None else int(found[1])


def _refusal(path: Path, number: int | None, size: int | None) -> str | None:
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if number in _NO_SPACE:
        need = "" if size is None else f"{_mebibytes(size)} are needed, "
        free = _mebibytes(shutil.disk_usage(existing).free)
        return f"{os.strerror(number)}; {need}{free} are free. Make room and start again, or choose another directory."
    if number in _NO_PERMISSION:
        return f"{os.strerror(number)}. Make {str(existing)!r} writable, or choose another directory."
    if number in _IN_THE_WAY:
        blocked = str(existing)
        kind = "a folder where a file has to be" if existing.is_dir() else "a file where a folder has to be"
        return f"{blocked!r} is {kind}. Move it away, or choose another directory."
    return None


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def make_writable_folder(folder: Path) -> None:
    """Make a folder, and see whether files can be written into it.

    Raises:
        `WriteError`: where they cannot.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")


def write_atomically(path: Path, write: Callable[[Any], None], size: int | None = None) -> None:
    """Let `write` fill an open binary file, then rename it to `path`. A crash leaves the old file or none.

    Args:
        path (`Path`): the file.
        write (`Callable`): fills it.
        size (`int`, *optional*): how many bytes it will have, for the message when they do not fit.

    Raises:
        `WriteError`: when the disk is full, and for a path that cannot be written.
    """
    with writing(path, size):
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


def write_together(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files that belong together into a folder, which may hold others.

    All are written beside their places first. A crash leaves the old ones, the new ones, or a folder without the last,
    which should be the one without which nobody reads the others.

    Args:
        folder (`Path`): the folder.
        files (`dict[str, bytes]`): the files' contents by name.

    Raises:
        `WriteError`: when the disk is full, and for a path that cannot be written.
    """
    last = list(files)[-1]
    with writing(folder / last, sum(map(len, files.values()))):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f".{last}.*.tmp"):
            _remove(left)
        work = Path(tempfile.mkdtemp(dir=folder, prefix=f".{last}.", suffix=".tmp"))
    try:
        for name, content in files.items():
            with writing(folder / name, len(content)), (work / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(work / name, 0o644)
        with writing(folder / last):
            (folder / last).unlink(missing_ok=True)
        for name in files:
            with writing(folder / name):
                os.replace(work / name, folder / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders of a process that was killed while it wrote into a folder."""
    for path in [*folder.glob(".*.tmp"), *folder.glob(".*.tmp.old")]:
        _remove(path)


def remove_folder(folder: Path) -> None:
    """Remove a folder, as far as others can see whole or not at all.

    What a process leaves of it that is killed here has another name, see [`remove_leftovers`].
    """
    if folder.is_dir():
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
        os.replace(folder, work / folder.name)
        shutil.rmtree(work, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON, whole or not at all."""
    content = (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
    write_atomically(path, lambda file: file.write(content), len(content))


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


def write_folder_atomically(folder: Path, write: Callable[[Path], None], size: int | None = None) -> None:
    """Let `write` fill a new folder, then put it in the place of `folder`.

    Args:
        folder (`Path`): the folder.
        write (`Callable`): fills a folder of another name.
        size (`int`, *optional*): how many bytes it will have, for the message when they do not fit.

    Raises:
        `WriteError`: when the disk is full, and for a path that cannot be written.
    """
    with writing(folder, size):
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
                _remove(old)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, by its path below it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def named_differences(found: Any, expected: Any, name: str = "") -> Iterator[str]:
    """Dotted names of the values in which two nested dicts differ, each with both values."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        for key in dict.fromkeys([*found, *expected]):
            yield from named_differences(found.get(key), expected.get(key), f"{name}.{key}" if name else str(key))
    elif found != expected:
        yield f"{name}: found {found!r}, expected {expected!r}"
