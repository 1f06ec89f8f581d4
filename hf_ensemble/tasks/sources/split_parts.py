"""Which rows of a dataset are trained, evaluated and tested on."""

from dataclasses import dataclass

from datasets import Dataset

from ...errors import TaskError


@dataclass(frozen=True)
class SplitPart:
    """Some rows of a split or file.

    Args:
        place (`str`): the split or file.
        table (`Dataset`): the rows.
        positions (`range`): where they stand in the split or file.
    """

    place: str
    table: Dataset
    positions: range

    @classmethod
    def of(cls, task: str, rows: Dataset, place: str, named: str, key: str) -> "SplitPart":
        """All rows of a split, or those that "train[:100]" or "train[10%:20%]" names.

        Raises:
            `TaskError`: for a part that cannot be read.
        """
        if "[" not in named:
            return cls(place, rows, range(len(rows)))
        begin, colon, end = named[named.index("[") + 1 : -1].partition(":")
        try:
            if not colon:
                raise ValueError("no colon")
            bounds = [
                round(float(bound[:-1]) / 100 * len(rows)) if bound.endswith("%") else int(bound) if bound else None
                for bound in (begin.strip(), end.strip())
            ]
        except ValueError as error:
            raise TaskError(
                f"Dataset {task!r}: expected a part of a split like 'train[:1000]' or 'train[10%:20%]' in {key}, found "
                f"{named!r}. Correct it."
            ) from error
        positions = range(*slice(*bounds).indices(len(rows)))
        return cls(place, rows.select(positions), positions)

    def shared_with(self, other: "SplitPart") -> int:
        """Number of rows that stand in both."""
        if self.place != other.place:
            return 0
        begin, end = max(self.positions.start, other.positions.start), min(self.positions.stop, other.positions.stop)
        return max(end - begin, 0)
