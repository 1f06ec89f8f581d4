"""Locks that keep two captures from writing the same shards of a store."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .._files import writing
from ..errors import StoreLockedError

# Long enough for another process that only looks whether a lock is held.
_SECONDS = 0.3
_SHARD = "{}-of-{}"


@contextmanager
def exclusive_writers(folders: Sequence[Path], shard: tuple[int, int] | None = None) -> Iterator[None]:
    """While open, no other process can write into the stores, or with `shard`, this part of them.

    The lock of a killed process is released at once.

    Args:
        folders (`Sequence[Path]`): the stores.
        shard (`tuple[int, int]`, *optional*): index and number of the parts that processes write beside each other.

    Raises:
        `StoreLockedError`: when another process is writing.
    """
    with ExitStack() as stack:
        for folder in map(Path, folders):
            stack.enter_context(_held(folder, "" if shard is None else _SHARD.format(*shard), _SECONDS))
            # Whoever locks the whole store looks for parts and the other way round, each with its own lock held.
            parts = folder.parent.glob(f".{folder.name}.{_SHARD.format('*', '*')}.lock")
            others = parts if shard is None else [_lock_file(folder)]
            if any(map(_is_held, others)):
                raise _locked(folder)
        yield


@contextmanager
def shared_records(folders: Sequence[Path]) -> Iterator[None]:
    """While open, no other process changes what the parts of the stores share: manifest and preconditioner.

    It waits for one that does.
    """
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(_held(Path(folder), "records", -1))
        yield


@contextmanager
def _held(folder: Path, name: str, timeout: float) -> Iterator[None]:
    path = _lock_file(folder, name)
    lock = FileLock(path, timeout=timeout, poll_interval=0.02)
    try:
        with writing(path):
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except Timeout as error:
        raise _locked(folder) from error
    try:
        yield
    finally:
        lock.release()


def _lock_file(folder: Path, name: str = "") -> Path:
    # Next to the directory, which has to be empty for a new store.
    return folder.with_name(f".{folder.name}.{name}.lock" if name else f".{folder.name}.lock")


def _is_held(path: Path) -> bool:
    lock = FileLock(path, timeout=_SECONDS, poll_interval=0.02)
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False


def _locked(folder: Path) -> StoreLockedError:
    return StoreLockedError(
        f"Another capture is writing into {str(folder)!r}. Wait for it to finish, or choose another directory."
    )
