"""What a run's stages took, as tables."""

from ...runs import Results
from .tables import Cell, PageTable


def cost_tables(results: Results) -> list[PageTable]:
    """Seconds of each stage."""
    known = [seconds for seconds in results.stage_seconds.values() if seconds is not None]
    most = max(known, default=0.0) or 1.0
    rows = [
        [
            Cell(name.replace(":", " ").replace("_", " ")),
            Cell("-", note="was interrupted")
            if seconds is None
            else Cell(f"{seconds:,.1f}", seconds, bar=seconds / most),
        ]
        for name, seconds in results.stage_seconds.items()
    ]
    foot = [Cell("together"), Cell(f"{sum(known):,.1f}", sum(known))]
    return [PageTable("Stages", ["stage", "seconds"], rows, foot)] if rows else []
