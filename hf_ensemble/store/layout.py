"""What lies in a gradient store's directory.

    manifest.json               identity, plan, versions, status; written first, marked complete last
    preconditioner.safetensors  what every parameter's gradient was multiplied by, where it was; before any shard
    shard-00000.features.npy    (rows, dim) array; row i times its scale is the gradient feature; of bfloat16 the
                                bits, as int16
    shard-00000.rows.arrow      split, task, example_id, margin, loss, num_tokens, scale, excluded of each row
    shard-00000.json            checksums of the two; written last, so that a shard with this file is whole

A shard holds a fixed stretch of the plan (the list of all rows to capture), so that a killed pass goes on with the
first shard that is missing and ends with the same files.
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
# How features are stored, by name. NumPy has no bfloat16: its bits are kept as whole numbers.
_STORED = {"float16": np.dtype("float16"), "bfloat16": np.dtype("int16"), "float32": np.dtype("float32")}
FEATURE_DTYPES = tuple(_STORED)


def stored_dtype(name: str) -> np.dtype:
    """Dtype of a shard's array for features of dtype `name`.

    Raises:
        `ConfigurationError`: for another name than those of `FEATURE_DTYPES`.
    """
    if name not in _STORED:
        raise ConfigurationError(f"Features are stored as one of {FEATURE_DTYPES}, found {name!r}.")
    return _STORED[name]


def as_stored(features: np.ndarray, name: str) -> np.ndarray:
    """Float32 features as a shard's array."""
    if name != "bfloat16":
        return features.astype(stored_dtype(name))
    return torch.from_numpy(features).to(torch.bfloat16).view(torch.int16).numpy()


def from_stored(stored: np.ndarray, name: str) -> np.ndarray:
    """The float32 features of a shard's array, or of some of its rows."""
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
    """The manifest.

    Raises:
        `StoreError`: when there is none, or it is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(f"No gradient store in {str(folder)!r}: expected a {MANIFEST}. Capture gradients first.")
    try:
        return read_json(path)
    except ValueError as error:
        raise StoreError(
            f"{MANIFEST} in {str(folder)!r} is damaged: {error}. Capture into another directory."
        ) from error


def read_preconditioner(folder: Path) -> dict[str, np.ndarray] | None:
    """What every parameter's gradient was multiplied by, by name; `None` where gradients were taken as they are.

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
