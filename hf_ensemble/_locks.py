"""File locks that hold between processes and machines, and let go when a process dies."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from ._files import writing
from .errors import WriteError
from .logging import get_logger

try:
    import fcntl
except ImportError:  # Windows, where locks are of another kind
    fcntl = None

logger = get_logger(__name__)

# Long enough for another process that only looks whether a lock is held, which takes no time.
_REFUSED_AFTER, _LOOKED_FOR, _POLL = 0.3, 0.1, 0.02
# Who waits for longer says what for.
_TOLD_AFTER = 10.0


@contextmanager
def held(
    path: Path, refused: Callable[[], Exception] | None = None, again: Literal["thread", "process"] | None = None
) -> Iterator[FileLock]:
    """While open, no other process holds a lock. The lock of a killed process is released at once.

    Args:
        path (`Path`): the lock's file; its folder is created where it does not exist.
        refused (`Callable`, *optional*): makes the error for a lock that another process holds; it is waited for else.
        again (`str`, *optional*):
            Who may take the lock once more while holding it: a `"thread"`, or the `"process"` in whichever thread.
            Nobody by default.

    Raises:
        `WriteError`: where the file cannot be written, and on a file system without locks.
    """
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    check_file_locks(path.parent)
    lock = FileLock(path, poll_interval=_POLL, is_singleton=again is not None, thread_local=again == "thread")
    try:
        with writing(path):
            lock.acquire(timeout=_TOLD_AFTER if refused is None else _REFUSED_AFTER)
    except Timeout as error:
        if refused is not None:
            raise refused() from error
        logger.warning("Waiting for another process, which holds the lock %s.", path)
        lock.acquire(timeout=-1)
    try:
        yield lock
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Whether something holds a lock, this process included."""
    if not path.is_file():
        return False
    lock = FileLock(path, poll_interval=_POLL)
    try:
        lock.acquire(timeout=_LOOKED_FOR)
    except Timeout:
        return True
    lock.release()
    return False


@cache
def check_file_locks(folder: Path) -> None:
    """See whether files in a folder can be locked.

    Raises:
        `WriteError`: where they cannot, so that nothing would keep processes from each other's files.
    """
    if fcntl is None:
        return
    with writing(folder), tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise WriteError(
                f"{str(folder)!r} is on a file system without file locks (flock): {error.strerror}. They keep "
                "processes from each other's files. Mount it with locks, Lustre with -o flock and NFS as version 4, or "
                "choose another directory."
            ) from error
