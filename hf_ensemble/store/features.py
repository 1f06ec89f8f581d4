"""Features that stay on disk until rows of them are asked for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .layout import features_file, from_stored

# Maximum number of features in memory at once; a reader may hold them in float64.
BLOCK = 8_000_000


class StoredFeatures:
    """Features `(n, d)` of some rows of a store, read from its memory-mapped shards as they are indexed.

    `features[rows]` and `features[rows, columns]` are float32 arrays of these rows alone; `features[:]` and
    `np.asarray(features)` read everything. [`row_blocks`] goes through all rows in little memory.

    Args:
        folder (`Path`): directory of the store.
        manifest (`dict`): its manifest.
        positions (`np.ndarray` of shape `(n,)`): the rows' positions in the store.
        scale (`np.ndarray` of shape `(n,)`): factor of each row.
    """

    dtype = np.dtype(np.float32)
    ndim = 2

    def __init__(self, folder: Path, manifest: dict[str, Any], positions: np.ndarray, scale: np.ndarray):
        self._folder, self._manifest = folder, manifest
        self._positions, self._scale = positions, scale

    @property
    def shape(self) -> tuple[int, int]:
        return len(self._positions), self._manifest["dim"]

    def __len__(self) -> int:
        return len(self._positions)

    def take(self, rows: np.ndarray) -> "StoredFeatures":
        """Some rows, by index or mask, which stay on disk."""
        return StoredFeatures(self._folder, self._manifest, self._positions[rows], self._scale[rows])

    def __getitem__(self, key: Any) -> np.ndarray:
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        positions, scale = self._positions[rows], self._scale[rows]
        if np.ndim(positions) == 0:
            return self[[rows], columns][0]
        size, dtype = self._manifest["shard_size"], self._manifest["dtype"]
        out = np.empty((len(positions), len(range(self.shape[1])[columns])), dtype=np.float32)
        for shard in np.unique(positions // size):
            here = np.flatnonzero(positions // size == shard)
            mapped = np.load(features_file(self._folder, shard), mmap_mode="r", allow_pickle=False)
            out[here] = from_stored(mapped[positions[here] - shard * size, columns], dtype)
        out *= scale[:, None]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


# Features in memory, mapped from one file, or in a store.
Features = np.ndarray | StoredFeatures


def take_rows(features: Features, rows: np.ndarray) -> Features:
    """Some rows, by index or mask; those of a store stay on disk."""
    return features.take(rows) if isinstance(features, StoredFeatures) else features[rows]


def row_blocks(features: Features, block: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
    """Consecutive rows, at most `block` features at once (`BLOCK` by default): which rows, and an array of them."""
    rows = max(1, (block or BLOCK) // max(1, features.shape[1]))
    for start in range(0, len(features), rows):
        part = slice(start, min(start + rows, len(features)))
        yield part, features[part]


def column_blocks(features: Features, block: int | None = None) -> Iterator[np.ndarray]:
    """Consecutive columns of all rows, at most `block` features at once."""
    columns = max(1, (block or BLOCK) // max(1, len(features)))
    for start in range(0, features.shape[1], columns):
        yield features[:, start : start + columns]
