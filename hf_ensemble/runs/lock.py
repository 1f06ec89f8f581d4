"""The locks that keep two processes from working in one run, or on one of its stages."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .._files import read_json, write_json
from .._locks import held, is_held
from ..errors import RecordError, RunLockedError

_LOCK, _HOLDER, _RECORD_LOCK = ".run.lock", ".run.holder.json", ".record.lock"


@contextmanager
def exclusive_run(path: Path) -> Iterator[None]:
    """While open, no other process can open the run. The lock of a killed process is released at once.

    Args:
        path (`Path`): the run's directory; created where it does not exist.

    Raises:
        `RunLockedError`: when another process works in the run.
    """
    with _exclusive(path, f"in the run in {str(path)!r}", "choose another output_dir"):
        yield


@contextmanager
def exclusive_stage(folder: Path, run: Path, name: str) -> Iterator[None]:
    """The same of one stage of a run.

    Args:
        folder (`Path`): where the lock lies.
        run (`Path`): the run's directory, for the message.
        name (`str`): the stage.

    Raises:
        `RunLockedError`: when another process works on the stage.
    """
    with _exclusive(folder, f"in the run in {str(run)!r}, on {name}", "start another stage"):
        yield


@contextmanager
def exclusive_record(path: Path) -> Iterator[None]:
    """While open, no other process or thread changes the record of the run in a directory; waits for one that does."""
    with held(path / _RECORD_LOCK, again="thread"):
        yield


def holder_of(folder: Path) -> str | None:
    """Which process holds the lock of a run or a stage; `None` where none does."""
    # A process that was killed leaves its name behind, but not its lock.
    return _holder(folder) if (folder / _HOLDER).is_file() and is_held(folder / _LOCK) else None


@contextmanager
def _exclusive(folder: Path, where: str, otherwise: str) -> Iterator[None]:
    def refused() -> RunLockedError:
        return RunLockedError(
            f"Another process works {where}: {_holder(folder)}. Wait for it to finish, stop it, or {otherwise}."
        )

    # One lock per path in this process, so that a callback may evaluate while its trainer trains, in whichever thread.
    with held(folder / _LOCK, refused, again="process") as lock:
        try:
            if lock.lock_counter == 1:
                write_json(folder / _HOLDER, {"process": os.getpid(), "host": socket.gethostname()})
            yield
        finally:
            if lock.lock_counter == 1:
                (folder / _HOLDER).unlink(missing_ok=True)


def _holder(path: Path) -> str:
    try:
        holder = read_json(path / _HOLDER)
        return f"process {holder['process']} on {holder['host']}"
    except (OSError, RecordError, KeyError, TypeError):  # it has just begun or ended
        return "an unknown one"
