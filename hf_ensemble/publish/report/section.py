"""What the page consists of."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .svg import inline_svg
from .tables import PageTable

# Rows of a chart; tables hold the rest.
MOST_ROWS = 80


@dataclass(frozen=True)
class Chart:
    """A picture.

    Args:
        caption (`str`): what it shows.
        svg (`str`): itself.
    """

    caption: str
    svg: str


@dataclass
class Section:
    """A part of the page.

    Args:
        name (`str`): its anchor.
        title (`str`): its heading.
        text (`str`): a sentence or two.
        charts (`list[Chart]`): pictures.
        tables (`list[PageTable]`): tables.
    """

    name: str
    title: str
    text: str = ""
    charts: list[Chart] = field(default_factory=list)
    tables: list[PageTable] = field(default_factory=list)

    def draw(self, caption: str, label: str, draw: Callable[[Path], None]) -> None:
        """Add a picture."""
        self.charts.append(Chart(caption, inline_svg(draw, f"{self.name}-{len(self.charts)}", label)))
