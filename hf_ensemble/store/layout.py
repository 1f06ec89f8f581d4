"""What lies in a gradient store's directory.

    manifest.json               identity, plan, versions, status; written first, marked complete last
    preconditioner.safetensors  what every parameter's gradient was multiplied by, where it was; before any shard
    shard-00000.features.npy    (rows, dim) array; row i times its scale is the gradient feature
    shard-00000.rows.arrow      split, task, example_id, margin, loss, num_tokens, scale, excluded of each row
    shard-00000.json            checksums of the two; written last, so that a shard with this file is whole

A shard holds a fixed stretch of the plan (the list of all rows to capture), so that a killed pass goes on with the
first shard that is missing and ends with the same files.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.numpy

from .._files import read_json
from ..errors import ConfigurationError, StoreError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
PRECONDITIONER = "preconditioner.safetensors"
FeatureDtype = Literal["float16", "float32"]


def numpy_dtype(name: str) -> np.dtype:
    """Dtype of stored features.

    Raises:
        `ConfigurationError`: for anything but float16 and float32.
    """
    if name not in ("float16", "float32"):
        raise ConfigurationError(f"Features are stored as 'float16' or 'float32', found {name!r}.")
    return np.dtype(name)


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
