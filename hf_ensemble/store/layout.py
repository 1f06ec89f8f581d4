"""Files of a gradient store.

    manifest.json               identity, plan, versions, status; written first, marked complete last
    preconditioner.safetensors  scales of every parameter's gradient, if there are any; written before any shard
    shard-00000.features.npy    (rows, dim) array; row i times its scale is the gradient feature; bfloat16 is stored as
                                int16 bit patterns
    shard-00000.rows.arrow      split, task, example_id, margin, loss, num_tokens, other_entropy, scale, excluded of
                                each row
    shard-00000.json            checksums of the two; written last, so a shard with this file is complete

A shard holds a fixed range of the plan (the list of all rows to capture), so an interrupted pass resumes at the first
missing shard and ends with the same files.
"""

from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

from .._files import read_json, sha256_of
from .._records import check_checksum
from ..errors import ConfigurationError, RecordError, StoreError

FORMAT, FORMAT_VERSION = "hf_ensemble.gradient_store", 3
MANIFEST = "manifest.json"
# What a manifest holds in any state of its store.
_KEYS = ("status", "num_rows", "dim", "dtype", "shard_size", "num_shards", "identity")
PRECONDITIONER = "preconditioner.safetensors"
FEATURE_DTYPES = ("float16", "bfloat16", "float32")
# As they are stored. NumPy has no bfloat16: its bits are stored as integers.
_STORED = dict(zip(FEATURE_DTYPES, map(np.dtype, ("float16", "int16", "float32"))))


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
    """Read the manifest, without its checksum.

    Raises:
        `StoreError`: for a missing, damaged or altered manifest, and one of another release.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(f"Expected a gradient store in {str(folder)!r}, found no {MANIFEST}. Capture gradients first.")
    remedy = f"Delete the folder {str(folder)!r} and capture again."
    data = _read_object(path, remedy)
    if data.get("format") != FORMAT:
        raise StoreError(f"{str(path)!r} has format {data.get('format')!r}, expected {FORMAT!r}. {remedy}")
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{str(path)!r} has format version {version!r}, this release reads {FORMAT_VERSION}. Capture again, or use "
            "the release that wrote it."
        )
    lacking = [key for key in _KEYS if key not in data]
    if lacking:
        raise StoreError(f"{str(path)!r} lacks {lacking}. {remedy}")
    return _checked(data, path, remedy)


def read_marker(folder: Path, shard: int) -> dict[str, str]:
    """Checksums of a shard's files, by name.

    Raises:
        `StoreError`: for a missing, damaged or altered marker, and one without the checksums.
    """
    path = marker_file(folder, shard)
    if not path.is_file():
        raise StoreError(f"{path.name} is missing from {str(folder)!r}. Capture again.")
    remedy = "Delete it and capture again."
    found = _checked(_read_object(path, remedy), path, remedy).get("sha256")
    expected = {features_file(folder, shard).name, rows_file(folder, shard).name}
    if not isinstance(found, dict) or set(found) != expected:
        raise StoreError(f"{str(path)!r} holds no checksums of {' and '.join(sorted(expected))}. {remedy}")
    return found


def check_file(folder: Path, name: str, checksum: str, record: str) -> None:
    """Make sure that a file of a store is as it was written; `record` is the file to delete where it is not.

    Raises:
        `StoreError`: for a missing or altered file.
    """
    path = folder / name
    if not path.is_file():
        raise StoreError(f"{name} is missing from {str(folder)!r}. Capture again.")
    if sha256_of(path) != checksum:
        raise StoreError(
            f"{name} in {str(folder)!r} was altered (its checksum differs). Delete {record} and capture again."
        )


def _read_object(path: Path, remedy: str) -> dict:
    try:
        data = read_json(path)
    except (RecordError, OSError) as error:
        raise StoreError(f"{str(path)!r} cannot be read: {error.__cause__ or error}. {remedy}") from error
    if not isinstance(data, dict):
        raise StoreError(f"{str(path)!r} is damaged: expected an object, found {data!r:.60}. {remedy}")
    return data


def _checked(data: dict, path: Path, remedy: str) -> dict:
    try:
        check_checksum(data, str(path), remedy)
    except RecordError as error:
        raise StoreError(str(error)) from error
    return {key: value for key, value in data.items() if key != "checksum"}


def has_shard(folder: Path, shard: int) -> bool:
    """Whether all files of a shard are there."""
    return all(file(folder, shard).is_file() for file in (marker_file, features_file, rows_file))


def has_every_file(folder: Path) -> bool:
    """Whether a store was finished and none of its files was deleted since.

    Raises:
        `StoreError`: for a damaged manifest.
    """
    if not (folder / MANIFEST).is_file():
        return False
    manifest = read_manifest(folder)
    if "preconditioner_sha256" in manifest and not (folder / PRECONDITIONER).is_file():
        return False
    return manifest["status"] == "complete" and all(has_shard(folder, s) for s in range(manifest["num_shards"]))


def num_shards(folder: Path) -> tuple[int, int]:
    """How many shards of a store are complete, and how many there will be; zeros before it is begun.

    Raises:
        `StoreError`: for a damaged manifest.
    """
    if not (folder / MANIFEST).is_file():
        return 0, 0
    count = read_manifest(folder)["num_shards"]
    return sum(has_shard(folder, shard) for shard in range(count)), count


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
