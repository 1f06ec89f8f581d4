"""Matplotlib's pictures as parts of a page: text stays text, and colours follow the page's theme."""

import re
import tempfile
import warnings
from collections.abc import Callable
from html import escape
from pathlib import Path

from ..drawing import BLUE, ORANGE

# Variables of the page's style sheet in place of the colours that pictures are drawn with.
_COLORS = {
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    "#000000": "var(--ink)",
    "#ffffff": "var(--paper)",
    "#999999": "var(--grey)",
    "#cccccc": "var(--rule)",
    "#d9d9d9": "var(--rule)",
    "#b0b0b0": "var(--rule)",
}
_SIZE = re.compile(r"font: ?(?:[a-z0-9]+ )*?([\d.]+px)[^;\"]*")
_ID = re.compile(r' id="([^"]*)"')


def inline_svg(draw: Callable[[Path], None], name: str, label: str) -> str:
    """What a function draws to a file, to be put into a page.

    Args:
        draw (`Callable`): draws to the path that it is given.
        name (`str`): told apart from the page's other pictures by it; a plain word.
        label (`str`): what a screen reader says.
    """
    import matplotlib

    settings = {"svg.fonttype": "none", "svg.hashsalt": name}
    with tempfile.TemporaryDirectory() as folder, matplotlib.rc_context(settings), warnings.catch_warnings():
        # The page's own font has the glyphs that matplotlib's lacks.
        warnings.filterwarnings("ignore", message="Glyph")
        path = Path(folder) / "picture.svg"
        draw(path)
        text = path.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = _SIZE.sub(r"font-size: \1", text)
    for color, variable in _COLORS.items():
        text = re.sub(re.escape(color), variable, text, flags=re.IGNORECASE)
    used = set(re.findall(r"url\(#([^)]*)\)", text)) | set(re.findall(r'href="#([^"]*)"', text))
    text = _ID.sub(lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    opening = f'<svg viewBox="0 0 {size[1]} {size[2]}" role="img" aria-label="{escape(label)}"'
    opening += f' style="--width: {float(size[1]):.0f}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return opening + text[text.index(">") + 1 :]
