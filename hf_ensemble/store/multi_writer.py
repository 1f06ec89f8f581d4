"""Several stores of the same rows, filled by one pass."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .recipe import TrainingRecipe
from .writer import CapturedRows, GradientStoreWriter, check_space, sole_writer


class GradientStoreWriters:
    """Writers of the same plan and shard size, each with columns of its own.

    Args:
        writers (`Sequence[GradientStoreWriter]`): at least one; rows have the columns of all of them, in this order.
    """

    def __init__(self, writers: Sequence[GradientStoreWriter]):
        self._writers = list(writers)
        ends = np.cumsum([writer.dim for writer in self._writers]).tolist()
        self._columns = [slice(end - writer.dim, end) for writer, end in zip(self._writers, ends)]

    def missing_shards(self) -> list[int]:
        """Shards that are not whole in every store."""
        return sorted({shard for writer in self._writers for shard in writer.missing_shards()})

    def rows_of(self, shard: int) -> range:
        """Positions in the plan that a shard holds."""
        return self._writers[0].rows_of(shard)

    def check_space(self) -> None:
        """See [`check_space`]."""
        check_space(self._writers)

    def preconditioner(self) -> dict[str, np.ndarray] | None:
        """The one that any of the stores keeps."""
        return next((kept for writer in self._writers if (kept := writer.preconditioner()) is not None), None)

    def write_preconditioner(self, scales: Mapping[str, np.ndarray]) -> None:
        """Keep it in every store that has none yet."""
        for writer in self._writers:
            if writer.preconditioner() is None:
                writer.write_preconditioner(scales)

    def write_shard(self, shard: int, rows: CapturedRows, exclude_non_finite: bool = False) -> None:
        """Write a shard where it is missing. See [`GradientStoreWriter.write_shard`]."""
        for writer, columns in zip(self._writers, self._columns):
            if not writer.has_shard(shard):
                own = replace(rows, features=rows.features[:, columns])
                writer.write_shard(shard, own, exclude_non_finite=exclude_non_finite)

    def finish(self, recipe: TrainingRecipe | None = None, **records: Any) -> None:
        """Mark every store complete, or renew the records of one that was."""
        for writer in self._writers:
            if writer.is_complete():
                writer.renew(recipe)
            else:
                writer.finish(recipe, **records)


@contextmanager
def sole_writers(folders: Sequence[Path]) -> Iterator[None]:
    """[`sole_writer`] of every folder."""
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(sole_writer(folder))
        yield
