"""Writes a gradient store, shard by shard."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import safetensors.numpy

from .._files import named_differences, remove_leftovers, sha256_of, write_atomically, write_json
from .._records import with_checksum
from ..errors import StoreError, StoreMismatchError
from ..logging import get_logger
from .layout import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    PRECONDITIONER,
    as_stored,
    check_file,
    features_file,
    has_shard,
    marker_file,
    read_manifest,
    read_preconditioner,
    rows_file,
    stored_dtype,
)
from .recipe import TrainingRecipe

logger = get_logger(__name__)

# Manifest entries on how the store was made, which are not part of its identity.
_RECORDS = ("status", "versions", "coverage", "preconditioner_sha256", "recipe")


@dataclass
class CapturedRows:
    """Captured rows in the order of the plan, `n` rows of `d` features.

    Args:
        features (`np.ndarray` of shape `(n, d)`): gradient features, float32.
        margin (`np.ndarray` of shape `(n,)`): log-odds of the answer.
        loss (`np.ndarray` of shape `(n,)`): mean token loss.
        num_tokens (`np.ndarray` of shape `(n,)`): number of answer tokens.
        other_entropy (`np.ndarray` of shape `(n,)`, *optional*): see [`FeatureTable`]; NaN where it is not known.
    """

    features: np.ndarray
    margin: np.ndarray
    loss: np.ndarray
    num_tokens: np.ndarray
    other_entropy: np.ndarray | None = None


class GradientStoreWriter:
    """Writes a store; resumes an unfinished one with the same identity.

    Args:
        folder (`Path`): directory of the store.
        identity (`dict`): what the features are made from (model, data, settings), as nested JSON values.
        plan (`Sequence[tuple[str, str, str]]`): split, task and example id of every row, in the order to store them.
        dim (`int`): number of features per row.
        dtype (`str`, *optional*, defaults to `"float16"`): `"float16"`, `"bfloat16"` or `"float32"`.
        shard_size (`int`, *optional*, defaults to 512): number of rows per shard.
        overwrite (`bool`, *optional*, defaults to `False`): delete an existing store with another identity.
        is_main_process (`bool`, *optional*, defaults to `True`): whether this process writes the manifest.
        is_shared (`bool`, *optional*, defaults to `False`): whether others write other shards at the same time.

    Raises:
        `StoreMismatchError`: when the directory has a store with another identity; the differences are named.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        plan: Sequence[tuple[str, str, str]],
        dim: int,
        dtype: str = "float16",
        shard_size: int = 512,
        overwrite: bool = False,
        is_main_process: bool = True,
        is_shared: bool = False,
    ):
        self.folder = Path(folder)
        self.plan = plan
        self.dim = dim
        self.dtype = stored_dtype(dtype)
        self.shard_size = shard_size
        self.is_shared = is_shared
        self.manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "status": "capturing",
            "num_rows": len(plan),
            "dim": dim,
            "dtype": dtype,
            "shard_size": shard_size,
            "num_shards": -(-len(plan) // shard_size),
            "identity": dict(identity),
        }
        if is_main_process:
            self._begin(overwrite)

    def _begin(self, overwrite: bool) -> None:
        path = self.folder / MANIFEST
        if not self.is_shared:
            remove_leftovers(self.folder)
        if path.exists():
            differences = list(
                named_differences(self._comparable(read_manifest(self.folder)), self._comparable(self.manifest))
            )
            if not differences:
                return
            if not overwrite:
                raise StoreMismatchError(
                    f"The store in {str(self.folder)!r} was made with other settings: {'; '.join(differences)}. "
                    "Choose another directory, or set overwrite=True."
                )
            self._clear()
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise StoreError(
                f"{str(self.folder)!r} is not empty and has no {MANIFEST}. Choose another directory, or delete this "
                "one if it was a store."
            )
        self._write_manifest(self.manifest)

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        write_json(self.folder / MANIFEST, with_checksum(manifest))

    def _clear(self) -> None:
        (self.folder / MANIFEST).unlink()
        (self.folder / PRECONDITIONER).unlink(missing_ok=True)
        for path in self.folder.glob("shard-*"):
            path.unlink()

    @staticmethod
    def _comparable(manifest: Mapping) -> dict:
        # Package versions are not compared: a store stays valid after an upgrade.
        return {key: value for key, value in manifest.items() if key not in _RECORDS}

    def write_preconditioner(self, scales: Mapping[str, np.ndarray]) -> None:
        """Save the scales of every parameter's gradient, which are needed to map features back to parameters.

        Their checksum goes into the manifest, so that a resumed pass uses no others.
        """
        data = safetensors.numpy.save({name: np.ascontiguousarray(scale) for name, scale in scales.items()})
        write_atomically(self.folder / PRECONDITIONER, lambda file: file.write(data), len(data))
        manifest = read_manifest(self.folder)
        self._write_manifest({**manifest, **self._updatable(None)})

    def preconditioner(self) -> dict[str, np.ndarray] | None:
        """The scales saved by [`write_preconditioner`], or `None`.

        Raises:
            `StoreError`: for a damaged or altered file.
        """
        scales = read_preconditioner(self.folder)
        checksum = read_manifest(self.folder).get("preconditioner_sha256")
        if scales is None or checksum is None:
            return None
        check_file(self.folder, PRECONDITIONER, checksum, PRECONDITIONER)
        return scales

    def missing_shards(self) -> list[int]:
        """Shards that are not complete yet."""
        return [shard for shard in range(self.manifest["num_shards"]) if not self.has_shard(shard)]

    def has_shard(self, shard: int) -> bool:
        """Whether a shard is complete."""
        return has_shard(self.folder, shard)

    def is_complete(self) -> bool:
        """Whether the store is finished."""
        return read_manifest(self.folder)["status"] == "complete"

    def num_missing_rows(self) -> int:
        """Number of rows in missing shards."""
        return sum(len(self.rows_of(shard)) for shard in self.missing_shards())

    def rows_of(self, shard: int) -> range:
        """Positions of a shard's rows in the plan."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.plan)))

    def write_shard(self, shard: int, rows: CapturedRows, exclude_non_finite: bool = False) -> None:
        """Write a complete shard.

        Args:
            shard (`int`): index of the shard.
            rows (`CapturedRows`): its rows, in the plan's order.
            exclude_non_finite (`bool`, *optional*, defaults to `False`):
                Mark rows with values that are not finite as excluded instead of raising an error.

        Raises:
            `StoreError`: when the rows do not fill the shard, and for values that are not finite; their task and
                example id are named.
        """
        positions = self.rows_of(shard)
        if rows.features.shape != (len(positions), self.dim):
            raise StoreError(
                f"Expected features of shape {(len(positions), self.dim)} for shard {shard}, found "
                f"{rows.features.shape}."
            )
        excluded = ~_finite(rows)
        if exclude_non_finite:
            rows = _without(rows, excluded)
        elif excluded.any():
            self._refuse(positions, excluded)
        # Gradients exceed the range of float16 (6e-8 to 65504): rows are stored relative to their largest entry.
        scale = np.abs(rows.features).max(axis=1, initial=0.0).astype(np.float32)
        scale[scale == 0] = 1.0
        features = as_stored(rows.features / scale[:, None], self.manifest["dtype"])
        splits, tasks, ids = zip(*(self.plan[i] for i in positions))
        entropy = np.full(len(positions), np.nan) if rows.other_entropy is None else rows.other_entropy
        table = pa.table(
            {
                "split": splits,
                "task": tasks,
                "example_id": ids,
                "margin": rows.margin.astype(np.float32),
                "loss": rows.loss.astype(np.float32),
                "num_tokens": rows.num_tokens.astype(np.int64),
                "other_entropy": entropy.astype(np.float32),
                "scale": scale,
                "excluded": excluded,
            }
        )
        write_atomically(
            features_file(self.folder, shard),
            lambda file: np.save(file, features, allow_pickle=False),
            features.nbytes,
        )
        write_atomically(
            rows_file(self.folder, shard),
            lambda file: pa.feather.write_feather(table, file, compression="uncompressed"),
            table.nbytes,
        )
        files = {p.name: sha256_of(p) for p in (features_file(self.folder, shard), rows_file(self.folder, shard))}
        write_json(marker_file(self.folder, shard), with_checksum({"rows": len(positions), "sha256": files}))

    def _refuse(self, positions: range, excluded: np.ndarray) -> None:
        bad = [self.plan[positions[i]] for i in np.flatnonzero(excluded)]
        named = ", ".join(f"{task}/{example_id}" for _, task, example_id in bad[:5])
        raise StoreError(
            f"{len(bad)} examples have gradients that are not finite: {named}. Check these rows and the model's "
            "precision (float16 weights overflow; use bfloat16 or float32), or drop them with non_finite='exclude'."
        )

    def finish(self, recipe: TrainingRecipe | None = None, **records: Any) -> None:
        """Mark the store complete.

        Args:
            recipe (`TrainingRecipe`, *optional*): the training that continues from theta0.
            records: how the store was made, as JSON values.

        Raises:
            `StoreError`: for missing shards.
        """
        missing = self.missing_shards()
        if missing:
            raise StoreError(f"The store in {str(self.folder)!r} lacks the shards {missing[:10]}. Capture them first.")
        # All that others wrote is in its place.
        remove_leftovers(self.folder)
        self._write_manifest({**self.manifest, "status": "complete", **records, **self._updatable(recipe)})

    def _updatable(self, recipe: TrainingRecipe | None) -> dict[str, Any]:
        """Records that may change in a finished store."""
        records: dict[str, Any] = {}
        preconditioner = self.folder / PRECONDITIONER
        if preconditioner.exists():
            records["preconditioner_sha256"] = sha256_of(preconditioner)
        if recipe is not None:
            records["recipe"] = asdict(recipe)
        return records

    def update_records(self, recipe: TrainingRecipe | None) -> None:
        """Update the recipe of a finished store, and the checksum of a preconditioner that was recomputed."""
        manifest = read_manifest(self.folder)
        updated = {**manifest, **self._updatable(recipe)}
        if updated != manifest:
            self._write_manifest(updated)


def _finite(rows: CapturedRows) -> np.ndarray:
    return np.isfinite(rows.features).all(axis=1) & np.isfinite(rows.margin) & np.isfinite(rows.loss)


def _without(rows: CapturedRows, excluded: np.ndarray) -> CapturedRows:
    """Replace excluded rows by zeros."""
    return CapturedRows(
        np.where(excluded[:, None], 0, rows.features),
        np.where(excluded, 0, rows.margin),
        np.where(excluded, 0, rows.loss),
        rows.num_tokens,
        rows.other_entropy,
    )


def check_space(writers: Sequence[GradientStoreWriter]) -> None:
    """Log the size of the missing shards of stores on one disk.

    Raises:
        `StoreError`: when the disk is too small for them.
    """
    folder = writers[0].folder
    rows = max(writer.num_missing_rows() for writer in writers)
    size = sum(writer.num_missing_rows() * writer.dim * writer.dtype.itemsize for writer in writers)
    free = shutil.disk_usage(folder).free
    logger.info("%d examples to capture into %s: %.1f MiB.", rows, folder, size / 2**20)
    if size > free:
        raise StoreError(
            f"The store in {str(folder)!r} needs another {size / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB are "
            "free. Choose another directory, or a smaller projection_dim."
        )
