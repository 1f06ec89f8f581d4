"""The documentation's site: every page is in it, its code is code, and its notebooks run."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.py"))


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in [*PAGES, *NOTEBOOKS]:
        name = page.relative_to(ROOT / "docs").with_suffix(".md").as_posix()
        assert re.search(rf": {re.escape(name)}$", navigation, flags=re.MULTILINE), f"{name} is not in mkdocs.yml"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_in_documents_is_python(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE):
        ast.parse(block)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebook, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(notebook))
    if notebook.stem == "selection":
        assert "friend" in found["trainer"].selection.auxiliary
        assert "contradiction" not in found["trainer"].selection.auxiliary
    else:
        mean = found["results"].mean_loss
        assert mean["ensemble"] < mean["baseline"] < mean["base"]


DOCSTRING = """What it does.

See [`Other`].

Args:
    name (`str`, *optional*, defaults to `"x: y"`): what it is called,
        at length.
    *args: more.
    path (`str` or `Path`):
        Where.

Returns:
    `list[str]`: what was found.

Raises:
    `ValueError`: for others.

Example:

```python
>>> run()
```
"""


def test_docstrings_become_lists(monkeypatch):
    pytest.importorskip("griffe")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "mkdocs"))
    sys.modules.pop("docstrings", None)
    from docstrings import as_markdown

    text = as_markdown(DOCSTRING)
    assert '- `name` (`str`, *optional*, defaults to `"x: y"`): what it is called,\n    at length.' in text
    assert "- `*args`: more." in text and "- `path` (`str` or `Path`):\n    Where." in text
    assert "**Returns**\n\n- `list[str]`: what was found." in text and "- `ValueError`: for others." in text
    assert "**Example**\n\n\n```python\n>>> run()\n```" in text
