"""Files of a gradient store.

    manifest.json               identity, plan, versions, status; written first, marked complete last
    preconditioner.safetensors  scales of every parameter's gradient, if there are any; written before any shard
    shard-00000.features.npy    (rows, dim) array; row i times its scale is the gradient feature; bfloat16 is stored as
                                int16 bit patterns
    shard-00000.rows.arrow      split, task, example_id, margin, loss, num_tokens, scale, excluded of each row
    shard-00000.json            checksums of the two; written last, so a shard with this file is complete

A shard holds a fixed range of the plan (the list of all rows to capture), so an interrupted pass resumes at the first
missing shard and ends with the same files.
"""

from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

from .._files import read_json
from ..errors import ConfigurationError, StoreError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
PRECONDITIONER = "preconditioner.safetensors"
# Stored data types by name. NumPy has no bfloat16: its bits are stored as integers.
_STORED = {"float16": np.dtype("float16"), "bfloat16": np.dtype("int16"), "float32": np.dtype("float32")}
FEATURE_DTYPES = tuple(_STORED)


def stored_dtype(name: str) -> np.dtype:
    """Data type of a shard's array for features of type `name`.

    Raises:
        `ConfigurationError`: for names not in `FEATURE_DTYPES`.
    """
    if name not in _STORED:
        raise ConfigurationError(f"feature_dtype has to be one of {FEATURE_DTYPES}, found {name!r}.")
    return _STORED[name]


def as_stored(features: np.ndarray, name: str) -> np.ndarray:
    """Convert float32 features to a shard's array."""
    if name != "bfloat16":
        return features.astype(stored_dtype(name))
    return torch.from_numpy(features).to(torch.bfloat16).view(torch.int16).numpy()


def from_stored(stored: np.ndarray, name: str) -> np.ndarray:
    """Convert a shard's array, or some of its rows, to float32 features."""
    if name != "bfloat16":
        return stored.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(stored)).view(torch.bfloat16).float().numpy()


def features_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.features.npy"


def rows_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.rows.arrow"


def marker_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.json"


def read_manifest(folder: Path) -> dict:
    """Read the manifest.

    Raises:
        `StoreError`: for a missing or damaged manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(f"Expected a gradient store in {str(folder)!r}, found no {MANIFEST}. Capture gradients first.")
    try:
        return read_json(path)
    except ValueError as error:
        raise StoreError(
            f"{MANIFEST} in {str(folder)!r} is damaged: {error}. Capture into another directory."
        ) from error


def read_preconditioner(folder: Path) -> dict[str, np.ndarray] | None:
    """Scales of every parameter's gradient, by name; `None` without a preconditioner.

    Raises:
        `StoreError`: for a damaged file.
    """
    path = folder / PRECONDITIONER
    if not path.is_file():
        return None
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise StoreError(
            f"{PRECONDITIONER} in {str(folder)!r} is damaged: {error}. Delete it and capture again."
        ) from error
