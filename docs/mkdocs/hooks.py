"""What MkDocs does for this site: pages of other folders, the reference, notebooks, and links between them."""

import importlib
import posixpath
import re
import sys
from pathlib import Path

import jupytext
from mkdocs.structure.files import File

import hf_ensemble

sys.path.insert(0, str(Path(__file__).parent))
from docstrings import identifier  # noqa: E402

ROOT = Path(__file__).parents[2]
# Folders beside docs/ that documents link to, and the files of the root.
_SHOWN = [*ROOT.glob("*.md"), ROOT / "LICENSE", *ROOT.glob("benchmarks/**/*.md"), *ROOT.glob("benchmarks/**/*.png")]
_CODE_FOLDERS = ("examples", "benchmarks", "callbacks", "hf_ensemble")
_CODE = [path for folder in _CODE_FOLDERS for path in ROOT.glob(f"{folder}/**/*") if path.is_file()]
_LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")
TITLES = {
    "tasks": "Tasks",
    "models": "Base models",
    "store": "Stores of gradients",
    "capture": "Capture",
    "estimate": "Estimates",
    "select": "Choices",
    "ensemble": "The ensemble model",
    "evaluate": "Evaluation",
    "runs": "Runs",
    "publish": "Cards and the Hub",
    "callbacks": "Callbacks",
    "train": "Trainers",
}


def on_config(config):
    reference = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    del reference[1:]
    reference += [{TITLES.get(stage, stage): f"reference/{stage}.md"} for stage in hf_ensemble._EXPORTS]
    return config


def on_files(files, config):
    for path in dict.fromkeys([*_SHOWN, *_CODE]):
        name = path.relative_to(ROOT).as_posix()
        if "__pycache__" not in name:
            # MkDocs takes a README for the index of its folder.
            name = "overview.md" if name == "README.md" else name
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for stage, names in hf_ensemble._EXPORTS.items():
        title = TITLES.get(stage, stage)
        package = importlib.import_module(f"hf_ensemble.{stage}")
        body = "\n\n".join(f"::: {identifier(name)}" for name in names)
        files.append(
            File.generated(config, f"reference/{stage}.md", content=f"# {title}\n\n{package.__doc__}\n\n{body}\n")
        )
    lines = [
        f"- [`{name}`]({stage}.md): {_first_line(getattr(hf_ensemble, name).__doc__)}"
        for stage, names in hf_ensemble._EXPORTS.items()
        for name in names
    ]
    text = "# Reference\n\nEverything here is imported from `hf_ensemble`.\n\n" + "\n".join(lines) + "\n"
    files.append(File.generated(config, "reference/index.md", content=text))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.py")):
        files.remove(files.get_file_from_path(f"notebooks/{path.name}"))
        notebook = jupytext.read(path)
        name = f"notebooks/{path.stem}"
        files.append(File.generated(config, f"{name}.ipynb", content=jupytext.writes(notebook, fmt="ipynb")))
        files.append(File.generated(config, f"{name}.md", content=_page_of(notebook, path.stem)))
    return files


def _page_of(notebook, name: str) -> str:
    """A notebook as a page."""
    cells = [
        cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```" for cell in notebook.cells
    ]
    title, *rest = cells
    return "\n\n".join([title, f"[Download this notebook]({name}.ipynb).", *rest]) + "\n"


def _first_line(docstring: str) -> str:
    return re.sub(r"\[(`[^`]+`)\]", r"\1", docstring.strip().split("\n\n")[0].replace("\n", " "))


def on_page_markdown(markdown, page, config, files):
    """Links of documents are those of the repository; here its folders lie within the site."""
    source = page.file.src_uri
    # Where a page of docs/ lies in the repository; others lie where they are.
    in_docs = (ROOT / "docs" / source).is_file()
    own = posixpath.dirname(f"docs/{source}" if in_docs else source)

    def moved(found):
        target = posixpath.normpath(posixpath.join(own, found[2]))
        inside = target.removeprefix("docs/") if target.startswith("docs/") else target
        inside = {"README.md": "overview.md", "docs": "index.md"}.get(inside, inside)
        if inside.startswith("notebooks/") and inside.endswith(".py"):
            inside = f"{inside.removesuffix('.py')}.md"
        known = files.get_file_from_path(inside)
        if known is None or found[0].startswith("](http"):
            return found[0]
        return f"{found[1]}{posixpath.relpath(inside, posixpath.dirname(source) or '.')}{found[3]}"

    # Code is not touched.
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else _LINK.sub(moved, part) for part in parts)
