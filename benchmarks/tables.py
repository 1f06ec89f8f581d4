"""Regenerate every table from the JSON next to it, without measuring.

python -m benchmarks.tables
"""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path

from .common import document, make_parser

FOLDER = Path(__file__).parent


def tables() -> Iterator[tuple[Path, str]]:
    """Path and text of the Markdown file that belongs to each JSON."""
    for path in sorted(FOLDER.glob("*/*.json")):
        module = importlib.import_module(f"{__package__}.{path.parent.name}.table")
        yield path.with_suffix(".md"), document(json.loads(path.read_text()), module.table)


def main() -> None:
    make_parser(__file__, __doc__, output=False).parse_args()
    for path, text in tables():
        path.write_text(text)


if __name__ == "__main__":
    main()
