"""Locks that keep two captures from writing into the same store."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .._files import writing
from ..errors import StoreError


@contextmanager
def exclusive_writer(folder: str | Path) -> Iterator[None]:
    """While open, no other process can write into the store. The lock of a killed process is released at once.

    Raises:
        `StoreError`: when another process is writing.
    """
    folder = Path(folder)
    # Next to the directory, which has to be empty for a new store.
    path = folder.with_name(f".{folder.name}.lock")
    lock = FileLock(path, timeout=0)
    try:
        with writing(path):
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except Timeout as error:
        raise StoreError(
            f"Another capture is writing into {str(folder)!r}. Wait for it to finish, or choose another directory."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def exclusive_writers(folders: Sequence[Path]) -> Iterator[None]:
    """[`exclusive_writer`] of every folder."""
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(exclusive_writer(folder))
        yield
