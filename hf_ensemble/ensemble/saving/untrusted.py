"""Reading untrusted files: none outside of a folder, and JSON objects only."""

import json
from pathlib import Path
from typing import Any

from ...errors import EnsembleLoadError

_MAX_JSON_BYTES = 2**24
REMEDY = "Restore the file, or save the ensemble or adapter again."


def checked_file(path: Path, root: Path, what: str) -> Path:
    """`path`, after checking that it is a regular file inside of `root`, links followed.

    Raises:
        `EnsembleLoadError`: for a missing file, and for one outside of `root`.
    """
    if not path.is_file():
        pickled = sorted(p.name for p in path.parent.glob("*.bin")) if path.suffix == ".safetensors" else []
        note = f" Found {pickled}: pickled weights are not read." if pickled else ""
        raise EnsembleLoadError(f"{what}: {path.name} is missing from {str(path.parent)!r}.{note} {REMEDY}")
    resolved = path.resolve()
    if not any(resolved.is_relative_to(allowed) for allowed in _allowed(root)):
        raise EnsembleLoadError(f"{what}: {path.name} leads out of {str(root)!r}, to {str(resolved)!r}.")
    return path


def _allowed(root: Path) -> list[Path]:
    """The folder itself and, for a snapshot in the Hub's cache, the files that it links to."""
    folders = [root.resolve()]
    for parent in (root.absolute(), *root.absolute().parents):
        if parent.parent.name == "snapshots":
            folders.append((parent.parent.parent / "blobs").resolve())
    return folders


def read_object(path: Path, what: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        `EnsembleLoadError`: for anything else.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise EnsembleLoadError(f"{what}: {path.name} has more than {_MAX_JSON_BYTES} bytes.")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        if isinstance(error, EnsembleLoadError):
            raise
        raise EnsembleLoadError(f"{what}: {path.name} is damaged: {error!r}. {REMEDY}") from error
    if not isinstance(data, dict):
        raise EnsembleLoadError(
            f"{what}: {path.name} is damaged: expected a JSON object, found {type(data).__name__}. {REMEDY}"
        )
    return data
