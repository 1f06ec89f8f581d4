"""Reads a gradient store."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather

from .._settings import checked_names, checked_path
from ..errors import StoreError
from .features import Features, StoredFeatures, row_blocks, take_rows
from .layout import (
    PRECONDITIONER,
    check_file,
    marker_file,
    num_shards,
    read_manifest,
    read_marker,
    read_preconditioner,
    rows_file,
)
from .recipe import TrainingRecipe


@dataclass(frozen=True)
class FeatureTable:
    """Gradient features of examples as arrays, `n` rows of `d` features: all that an estimate needs.

    Args:
        features (`np.ndarray` or [`StoredFeatures`] of shape `(n, d)`):
            Projected gradients of the margin. Those of a store stay on disk; `features[:]` reads them.
        margin (`np.ndarray` of shape `(n,)`): log-odds of the answer at the linearization point.
        task (`np.ndarray` of shape `(n,)`): index of each row's task in `task_names`.
        task_names (`tuple[str, ...]`): names of the tasks.
        example_id (`np.ndarray` of shape `(n,)`): id of each row within its task.
        num_tokens (`np.ndarray` of shape `(n,)`, *optional*): number of answer tokens of each row, if known.
        task_sizes (`np.ndarray` of shape `(T,)`, *optional*):
            Number of rows of each task of which these are a sample. By default they are all there are.
        other_entropy (`np.ndarray` of shape `(n,)`, *optional*):
            Entropy, in nats, of the model's distribution over the answers that are wrong, at the linearization point;
            NaN for answers of several tokens.
    """

    features: Features
    margin: np.ndarray
    task: np.ndarray
    task_names: tuple[str, ...]
    example_id: np.ndarray
    num_tokens: np.ndarray | None = None
    task_sizes: np.ndarray | None = None
    other_entropy: np.ndarray | None = None

    @property
    def num_captured(self) -> np.ndarray:
        """Number of rows of each task in the table, `(T,)`."""
        return np.bincount(self.task, minlength=len(self.task_names))

    @property
    def sizes(self) -> np.ndarray:
        """Number of rows of each task that these stand for, `(T,)`."""
        return self.num_captured if self.task_sizes is None else self.task_sizes

    @property
    def rows_per_captured(self) -> np.ndarray:
        """How many rows of its task a row stands for, by task, `(T,)`; 1 where all rows are captured."""
        return self.sizes / np.maximum(self.num_captured, 1)

    def of_rows(self, rows: np.ndarray) -> "FeatureTable":
        """Some of the rows, by their numbers, in this order; task sizes stay."""
        names = ("margin", "task", "example_id", "num_tokens", "other_entropy")
        known = {name: getattr(self, name) for name in names}
        arrays = {name: None if array is None else array[rows] for name, array in known.items()}
        return replace(self, features=take_rows(self.features, rows), **arrays)

    def fingerprint(self) -> str:
        """32 hexadecimal digits that depend on all values and names."""
        digest = hashlib.sha256(json.dumps([self.task_names, self.example_id.tolist()]).encode())
        for _, block in row_blocks(self.features):
            digest.update(np.ascontiguousarray(block))
        for array in (self.margin, self.task, self.task_sizes, self.other_entropy):
            if array is not None:
                digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.margin)


class GradientStore:
    """A finished gradient store. Its features stay on disk and are read in blocks.

    Args:
        folder (`str` or `Path`): directory of the store.
        verify (`bool`, *optional*, defaults to `True`): check every file against its checksum.

    Raises:
        `StoreError`: for a directory without a store, an unfinished store, and missing, truncated or altered files.

    Example:

    ```python
    >>> from hf_ensemble import GradientStore

    >>> store = GradientStore("out/gradients")  # doctest: +SKIP
    >>> store.table("validation").features.shape  # doctest: +SKIP
    (300, 4096)
    ```
    """

    def __init__(self, folder: str | Path, verify: bool = True):
        self.folder = checked_path("the folder of the store", folder, StoreError)
        self.manifest = read_manifest(self.folder)
        if self.manifest["status"] != "complete":
            there, count = num_shards(self.folder)
            raise StoreError(
                f"The store in {str(folder)!r} is unfinished: it has {there} of {count} shards. Wait for its capture, "
                "or run the same capture again to resume it."
            )
        self._shards = range(self.manifest["num_shards"])
        if verify:
            self.verify()
        self.rows = self._read_rows()

    def verify(self) -> None:
        """Check every file against its checksum; raises a [`StoreError`] that names the file."""
        if "preconditioner_sha256" in self.manifest:
            check_file(self.folder, PRECONDITIONER, self.manifest["preconditioner_sha256"], PRECONDITIONER)
        for shard in self._shards:
            for name, checksum in read_marker(self.folder, shard).items():
                check_file(self.folder, name, checksum, marker_file(self.folder, shard).name)

    def _read_rows(self) -> pa.Table:
        tables = [pa.feather.read_table(rows_file(self.folder, shard)) for shard in self._shards]
        return pa.concat_tables(tables).combine_chunks()

    @property
    def identity(self) -> dict:
        """What the features were made from: model, data and settings."""
        return self.manifest["identity"]

    @property
    def recipe(self) -> TrainingRecipe | None:
        """The training that continues from theta0, if it was recorded."""
        record = self.manifest.get("recipe")
        return None if record is None else TrainingRecipe(**record)

    @property
    def dim(self) -> int:
        return self.manifest["dim"]

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.rows["task"].to_pylist()))

    def __len__(self) -> int:
        return self.manifest["num_rows"]

    def preconditioner(self) -> dict[str, np.ndarray] | None:
        """Scales of every parameter's gradient, by name; `None` without a preconditioner."""
        return read_preconditioner(self.folder)

    @property
    def excluded(self) -> list[tuple[str, str, str]]:
        """Split, task and example id of the rows excluded because their gradients are not finite."""
        left_out = self.rows.filter(self.rows["excluded"])
        return list(zip(*(left_out[name].to_pylist() for name in ("split", "task", "example_id"))))

    def num_rows(self, split: str) -> int:
        """Number of rows of a split, without the excluded ones."""
        return int(self._kept(split).sum())

    def task_sizes(self, split: str, names: Sequence[str] | None = None) -> np.ndarray | None:
        """Number of rows of tasks in a split, `(T,)`, of which those captured are a sample; `None` where they are all.

        A task's share of excluded rows is taken off.

        Args:
            split (`str`): `"train"` or `"validation"`.
            names (`Sequence[str]`, *optional*): names of the tasks; all tasks by default.
        """
        known = self.identity.get("data", {}).get("num_rows", {}).get(split, {})
        names = self.task_names if names is None else names
        if not set(known) & set(names):
            return None
        here = np.array(self.rows["split"].to_pylist()) == split
        planned, kept = (
            Counter(task for task, is_own in zip(self.rows["task"].to_pylist(), own) if is_own)
            for own in (here, self._kept(split))
        )
        sizes = [known.get(name, planned[name]) * kept[name] / max(planned[name], 1) for name in names]
        return np.rint(sizes).astype(int)

    def _kept(self, split: str) -> np.ndarray:
        here = np.array(self.rows["split"].to_pylist()) == split
        return here & ~self.rows["excluded"].to_numpy(zero_copy_only=False)

    def table(self, split: str, tasks: Sequence[str] | Mapping[str, Sequence[str]] | None = None) -> FeatureTable:
        """The rows of a split, of all or some tasks. Features are read from disk when they are indexed.

        Args:
            split (`str`): `"train"` or `"validation"`.
            tasks (`Sequence[str]` or `dict[str, Sequence[str]]`, *optional*):
                Task names, or example ids by task. Rows are in the store's order. All tasks by default.

        Raises:
            `StoreError`: for tasks without such rows, and for missing examples.
        """
        names = self.task_names if tasks is None else tuple(checked_names("tasks", tasks, self.task_names, StoreError))
        if not names:
            raise StoreError(f"Expected at least one task, found none; the tasks of the store are {self.task_names}.")
        index = {name: i for i, name in enumerate(names)}
        row_tasks = np.array([index.get(task, -1) for task in self.rows["task"].to_pylist()])
        kept = self._kept(split) & (row_tasks >= 0)
        if isinstance(tasks, Mapping):
            kept &= self._among(tasks, kept)
        positions = np.flatnonzero(kept)
        lacking = [name for name, i in index.items() if not (row_tasks[positions] == i).any()]
        if lacking:
            raise StoreError(
                f"The store in {str(self.folder)!r} has no {split!r} rows of the tasks {lacking}; its tasks are "
                f"{list(self.task_names)}."
            )
        entropy = self.rows["other_entropy"].to_numpy()[positions]
        return FeatureTable(
            features=StoredFeatures(self.folder, self.manifest, positions, self.rows["scale"].to_numpy()[positions]),
            margin=self.rows["margin"].to_numpy()[positions],
            task=row_tasks[positions],
            task_names=names,
            example_id=np.array(self.rows["example_id"].to_pylist())[positions],
            num_tokens=self.rows["num_tokens"].to_numpy()[positions],
            # Rows that are asked for by name stand for themselves.
            task_sizes=None if isinstance(tasks, Mapping) else self.task_sizes(split, names),
            other_entropy=None if np.isnan(entropy).all() else entropy,
        )

    def _among(self, wanted: Mapping[str, Sequence[str]], kept: np.ndarray) -> np.ndarray:
        pairs = {(task, example_id) for task, ids in wanted.items() for example_id in ids}
        own = list(zip(self.rows["task"].to_pylist(), self.rows["example_id"].to_pylist()))
        lacking = sorted(pairs - {pair for pair, is_kept in zip(own, kept) if is_kept})
        if lacking:
            raise StoreError(
                f"The store in {str(self.folder)!r} lacks {len(lacking)} of the requested examples, for example "
                f"{'/'.join(lacking[0])!r}."
            )
        return np.array([pair in pairs for pair in own])
