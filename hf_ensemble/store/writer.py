"""Writing a gradient store, shard by shard."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import safetensors.numpy
from filelock import FileLock, Timeout

from .._files import named_differences, remove_leftovers, sha256_of, write_atomically, write_json
from ..errors import StoreError, StoreMismatchError
from ..logging import get_logger
from .layout import (
    FORMAT_VERSION,
    MANIFEST,
    PRECONDITIONER,
    as_stored,
    features_file,
    marker_file,
    read_manifest,
    read_preconditioner,
    rows_file,
    stored_dtype,
)
from .recipe import TrainingRecipe

logger = get_logger(__name__)

# Of a manifest, what tells how the store was made, not what it is made of.
_RECORDS = ("status", "versions", "coverage", "preconditioner_sha256", "recipe")


@dataclass
class CapturedRows:
    """What was captured of some examples, in the order of the plan; `n` rows of `d` features.

    Args:
        features (`np.ndarray` of shape `(n, d)`): gradient features, float32.
        margin (`np.ndarray` of shape `(n,)`): log-odds of the answer.
        loss (`np.ndarray` of shape `(n,)`): mean token loss.
        num_tokens (`np.ndarray` of shape `(n,)`): answer tokens.
    """

    features: np.ndarray
    margin: np.ndarray
    loss: np.ndarray
    num_tokens: np.ndarray


class GradientStoreWriter:
    """Fills a store directory; opens an unfinished one of the same identity to go on with it.

    Args:
        folder (`Path`): the store's directory.
        identity (`dict`): nested JSON values that say what the features are made of: model, data, configuration.
        plan (`Sequence[tuple[str, str, str]]`): split, task and example id of every row, in the order to store.
        dim (`int`): columns of the features.
        dtype (`str`): `"float16"`, `"bfloat16"` or `"float32"`.
        shard_size (`int`): rows of a shard.
        overwrite (`bool`): drop whatever store of another identity is there.
        is_main_process (`bool`): whether this process writes the manifest.

    Raises:
        `StoreMismatchError`: when the directory holds a store of another identity; the message names each difference.
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
    ):
        self.folder = Path(folder)
        self.plan = plan
        self.dim = dim
        self.dtype = stored_dtype(dtype)
        self.shard_size = shard_size
        self.manifest = {
            "format": "hf_ensemble.gradient_store",
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
                    "Choose another directory, or overwrite it."
                )
            self._clear()
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise StoreError(f"{str(self.folder)!r} is not empty and holds no {MANIFEST}. Choose another directory.")
        write_json(path, self.manifest)

    def _clear(self) -> None:
        (self.folder / MANIFEST).unlink()
        (self.folder / PRECONDITIONER).unlink(missing_ok=True)
        for path in self.folder.glob("shard-*"):
            path.unlink()

    @staticmethod
    def _comparable(manifest: Mapping) -> dict:
        # Package versions are recorded beside the identity: an upgrade does not make a store another one.
        return {key: value for key, value in manifest.items() if key not in _RECORDS}

    def write_preconditioner(self, scales: Mapping[str, np.ndarray]) -> None:
        """Keep what every parameter's gradient is multiplied by, for those who go back to the parameters."""
        data = safetensors.numpy.save({name: np.ascontiguousarray(scale) for name, scale in scales.items()})
        write_atomically(self.folder / PRECONDITIONER, lambda file: file.write(data))

    def preconditioner(self) -> dict[str, np.ndarray] | None:
        """What [`write_preconditioner`] kept; `None` before it did."""
        return read_preconditioner(self.folder)

    def missing_shards(self) -> list[int]:
        """Shards that are not whole yet."""
        return [shard for shard in range(self.manifest["num_shards"]) if not self.has_shard(shard)]

    def has_shard(self, shard: int) -> bool:
        """Whether a shard is whole."""
        return marker_file(self.folder, shard).exists()

    def is_complete(self) -> bool:
        """Whether the directory holds a finished store."""
        return read_manifest(self.folder)["status"] == "complete"

    def num_missing_rows(self) -> int:
        """Rows of the shards that are missing."""
        return sum(len(self.rows_of(shard)) for shard in self.missing_shards())

    def rows_of(self, shard: int) -> range:
        """Positions in the plan that a shard holds."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.plan)))

    def write_shard(self, shard: int, rows: CapturedRows, exclude_non_finite: bool = False) -> None:
        """Write one shard whole.

        Args:
            shard (`int`): which.
            rows (`CapturedRows`): its rows, in the plan's order.
            exclude_non_finite (`bool`, *optional*, defaults to `False`):
                Mark rows that hold a value that is not finite as excluded, in place of an error.

        Raises:
            `StoreError`: when the rows do not fill the shard, or hold a value that is not finite (the task and example
                are named).
        """
        positions = self.rows_of(shard)
        if rows.features.shape != (len(positions), self.dim):
            raise StoreError(f"Shard {shard} takes {(len(positions), self.dim)} features, found {rows.features.shape}.")
        excluded = ~_finite(rows)
        if exclude_non_finite:
            rows = _without(rows, excluded)
        elif excluded.any():
            self._refuse(positions, excluded)
        # float16 spans 6e-8 to 65504, gradients span more: each row is stored relative to its largest entry.
        scale = np.abs(rows.features).max(axis=1, initial=0.0).astype(np.float32)
        scale[scale == 0] = 1.0
        features = as_stored(rows.features / scale[:, None], self.manifest["dtype"])
        splits, tasks, ids = zip(*(self.plan[i] for i in positions))
        table = pa.table(
            {
                "split": splits,
                "task": tasks,
                "example_id": ids,
                "margin": rows.margin.astype(np.float32),
                "loss": rows.loss.astype(np.float32),
                "num_tokens": rows.num_tokens.astype(np.int64),
                "scale": scale,
                "excluded": excluded,
            }
        )
        write_atomically(features_file(self.folder, shard), lambda file: np.save(file, features, allow_pickle=False))
        write_atomically(
            rows_file(self.folder, shard),
            lambda file: pa.feather.write_feather(table, file, compression="uncompressed"),
        )
        files = {p.name: sha256_of(p) for p in (features_file(self.folder, shard), rows_file(self.folder, shard))}
        write_json(marker_file(self.folder, shard), {"rows": len(positions), "sha256": files})

    def _refuse(self, positions: range, excluded: np.ndarray) -> None:
        bad = [self.plan[positions[i]] for i in np.flatnonzero(excluded)]
        named = ", ".join(f"{task}/{example_id}" for _, task, example_id in bad[:5])
        raise StoreError(
            f"{len(bad)} examples have gradients that are not finite: {named}. Check these rows and the model's "
            "precision (float16 weights overflow; bfloat16 or float32 do not), or leave them out with "
            "non_finite='exclude'."
        )

    def finish(self, recipe: TrainingRecipe | None = None, **records: Any) -> None:
        """Mark the store complete, with the training that goes on from here and `records` (how it was made).

        Raises:
            `StoreError`: while shards are missing.
        """
        missing = self.missing_shards()
        if missing:
            raise StoreError(f"The store in {str(self.folder)!r} lacks the shards {missing[:10]}.")
        write_json(self.folder / MANIFEST, {**self.manifest, "status": "complete", **records, **self._present(recipe)})

    def _present(self, recipe: TrainingRecipe | None) -> dict[str, Any]:
        """Records of what may be renewed in a finished store."""
        records: dict[str, Any] = {}
        preconditioner = self.folder / PRECONDITIONER
        if preconditioner.exists():
            records["preconditioner_sha256"] = sha256_of(preconditioner)
        if recipe is not None:
            records["recipe"] = asdict(recipe)
        return records

    def renew(self, recipe: TrainingRecipe | None) -> None:
        """Of a finished store, replace the training that goes on from here, and the checksum of a preconditioner that
        was made again."""
        manifest = read_manifest(self.folder)
        renewed = {**manifest, **self._present(recipe)}
        if renewed != manifest:
            write_json(self.folder / MANIFEST, renewed)


def _finite(rows: CapturedRows) -> np.ndarray:
    return np.isfinite(rows.features).all(axis=1) & np.isfinite(rows.margin) & np.isfinite(rows.loss)


def _without(rows: CapturedRows, excluded: np.ndarray) -> CapturedRows:
    """Zeros in the place of excluded rows."""
    return CapturedRows(
        np.where(excluded[:, None], 0, rows.features),
        np.where(excluded, 0, rows.margin),
        np.where(excluded, 0, rows.loss),
        rows.num_tokens,
    )


def check_space(writers: Sequence[GradientStoreWriter]) -> None:
    """Say how large the missing shards of stores on one disk will be.

    Raises:
        `StoreError`: when the disk has no room for them.
    """
    folder = writers[0].folder
    rows = max(writer.num_missing_rows() for writer in writers)
    size = sum(writer.num_missing_rows() * writer.dim * writer.dtype.itemsize for writer in writers)
    free = shutil.disk_usage(folder).free
    logger.info("%d examples to capture into %s: %.1f MiB.", rows, folder, size / 2**20)
    if size > free:
        raise StoreError(
            f"The store in {str(folder)!r} needs {size / 2**30:.1f} GiB more, its disk has {free / 2**30:.1f} free. "
            "Choose another directory, or a smaller projection_dim."
        )


@contextmanager
def sole_writer(folder: str | Path) -> Iterator[None]:
    """While open, no other process writes into the store; a lock that a killed process held is free at once.

    Raises:
        `StoreError`: when another one is writing.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the store: a new store's directory has to be empty.
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise StoreError(
            f"Another capture is writing into {str(folder)!r}. Wait for it, or choose another directory."
        ) from error
    try:
        yield
    finally:
        lock.release()
