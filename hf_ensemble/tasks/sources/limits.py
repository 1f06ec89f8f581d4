"""Maximum numbers of rows by split."""

from collections.abc import Mapping

from datasets import Dataset

from ..._settings import check_at_least, check_one_of, checked_mapping
from ..task import SPLITS


def checked_limits(max_rows: Mapping[str, int] | None) -> dict[str, int]:
    """Maximum numbers of rows by split.

    Raises:
        `ConfigurationError`: for anything but positive integers by the names of splits.
    """
    limits = dict(checked_mapping("max_rows", max_rows or {}))
    for split, limit in limits.items():
        check_one_of("Each split in max_rows", split, SPLITS)
        check_at_least(f"The maximum number of {split} rows", limit, 1)
    return limits


def first_rows_of(splits: Mapping[str, Dataset], limits: Mapping[str, int]) -> dict[str, Dataset]:
    """The splits, each with at most as many of its first rows."""
    return {split: rows.select(range(min(limits.get(split, len(rows)), len(rows)))) for split, rows in splits.items()}
