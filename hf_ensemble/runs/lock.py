"""The lock that keeps two processes from working in one run."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .._files import read_json, write_json, writing
from ..errors import RecordError, RunLockedError

_LOCK, _HOLDER = ".run.lock", ".run.holder.json"


@contextmanager
def exclusive_run(path: Path) -> Iterator[None]:
    """While open, no other process can open the run. The lock of a killed process is released at once.

    Args:
        path (`Path`): the run's directory; created where it does not exist.

    Raises:
        `RunLockedError`: when another process works in the run.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    # One lock per path in this process, so that a callback may evaluate while its trainer trains.
    lock = FileLock(path / _LOCK, timeout=0, is_singleton=True)
    try:
        with writing(path / _LOCK):
            lock.acquire()
    except Timeout as error:
        raise RunLockedError(
            f"Another process works in the run in {str(path)!r}: {_holder(path)}. Wait for it to finish, stop it, or "
            "choose another output_dir."
        ) from error
    try:
        write_json(path / _HOLDER, {"process": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        (path / _HOLDER).unlink(missing_ok=True)
        lock.release()


def _holder(path: Path) -> str:
    try:
        holder = read_json(path / _HOLDER)
        return f"process {holder['process']} on {holder['host']}"
    except (OSError, RecordError, KeyError, TypeError):  # it has just begun or ended
        return "an unknown one"
