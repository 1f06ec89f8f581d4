"""Locks that keep two captures from writing the same shards of a store."""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from glob import escape
from pathlib import Path

from .._locks import held, is_held
from ..errors import StoreLockedError

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
            name = "" if shard is None else _SHARD.format(*shard)
            stack.enter_context(held(_lock_file(folder, name), partial(_locked, folder)))
            # Whoever locks the whole store looks for parts and the other way round, each with its own lock held.
            parts = folder.parent.glob(f".{escape(folder.name)}.{_SHARD.format('*', '*')}.lock")
            if shard is not None:
                # Shards are shared out by the number of parts: those of other numbers have some of the same.
                parts = [path for path in parts if not path.name.endswith(f"{_SHARD.format('', shard[1])}.lock")]
                parts.append(_lock_file(folder))
            for path in parts:
                if is_held(path):
                    raise _locked(folder, path, shard)
        yield


@contextmanager
def shared_records(folders: Sequence[Path]) -> Iterator[None]:
    """While open, no other process changes what the parts of the stores share: manifest and preconditioner.

    It waits for one that does.
    """
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(held(_lock_file(Path(folder), "records")))
        yield


def _lock_file(folder: Path, name: str = "") -> Path:
    # Next to the directory, which has to be empty for a new store.
    return folder.with_name(f".{folder.name}.{name}.lock" if name else f".{folder.name}.lock")


def _locked(folder: Path, other: Path | None = None, shard: tuple[int, int] | None = None) -> StoreLockedError:
    found = None if other is None else re.search(r"\.(\d+)-of-(\d+)\.lock$", other.name)
    if found is not None and shard is not None:
        return StoreLockedError(
            f"Another capture is writing part {found[1]}/{found[2]} of {str(folder)!r}, and this one is part "
            f"{shard[0]}/{shard[1]}, which has some of the same rows. Give all parts one count, or wait for it to end."
        )
    return StoreLockedError(
        f"Another capture is writing into {str(folder)!r}. Wait for it to finish, or choose another directory."
    )
