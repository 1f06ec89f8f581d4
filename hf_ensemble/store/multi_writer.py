"""Multiple stores of the same rows, filled in one pass."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .recipe import TrainingRecipe
from .writer import CapturedRows, GradientStoreWriter, check_space


class GradientStoreWriters:
    """Writers with the same plan and shard size and different feature columns.

    Args:
        writers (`Sequence[GradientStoreWriter]`): at least one writer; features are concatenated in this order.
    """

    def __init__(self, writers: Sequence[GradientStoreWriter]):
        self._writers = list(writers)
        ends = np.cumsum([writer.dim for writer in self._writers]).tolist()
        self._columns = [slice(end - writer.dim, end) for writer, end in zip(self._writers, ends)]

    def missing_shards(self) -> list[int]:
        """Shards that are incomplete in any store."""
        return sorted({shard for writer in self._writers for shard in writer.missing_shards()})

    def rows_of(self, shard: int) -> range:
        """Positions of a shard's rows in the plan."""
        return self._writers[0].rows_of(shard)

    def check_space(self) -> None:
        """See [`check_space`]."""
        check_space(self._writers)

    def preconditioner(self) -> dict[str, np.ndarray] | None:
        """The preconditioner, if any of the stores has one."""
        return next((kept for writer in self._writers if (kept := writer.preconditioner()) is not None), None)

    def write_preconditioner(self, scales: Mapping[str, np.ndarray]) -> None:
        """Save the preconditioner in every store that has none yet."""
        for writer in self._writers:
            if writer.preconditioner() is None:
                writer.write_preconditioner(scales)

    def write_shard(self, shard: int, rows: CapturedRows, exclude_non_finite: bool = False) -> None:
        """Write a shard to the stores that lack it. See [`GradientStoreWriter.write_shard`]."""
        for writer, columns in zip(self._writers, self._columns):
            if not writer.has_shard(shard):
                own = replace(rows, features=rows.features[:, columns])
                writer.write_shard(shard, own, exclude_non_finite=exclude_non_finite)

    def finish(self, recipe: TrainingRecipe | None = None, **records: Any) -> None:
        """Mark every store complete; stores that were complete get their records updated."""
        for writer in self._writers:
            if writer.is_complete():
                writer.update_records(recipe)
            else:
                writer.finish(recipe, **records)
