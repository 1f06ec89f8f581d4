"""A figure in the cards' style."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from .._files import write_atomically

# Okabe and Ito's colours, which the colour-blind tell apart.
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "0.6"


@contextmanager
def drawing(path: Path, figsize: tuple[float, float]) -> Iterator[Any]:
    """Axes to draw on; saved when the block ends, as PNG or SVG by the path's suffix."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    style = resources.files("hf_ensemble.model_cards") / "pictures.mplstyle"
    with resources.as_file(style) as style_file, plt.style.context(str(style_file)):
        figure, axes = plt.subplots(figsize=figsize, layout="constrained")
        try:
            yield axes
            write_atomically(path, lambda file: figure.savefig(file, format=path.suffix.lstrip(".") or "png"))
        finally:
            plt.close(figure)


def shortened(text: str, most: int = 26) -> str:
    """A name that fits beside a picture."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
