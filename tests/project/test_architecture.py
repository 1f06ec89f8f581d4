"""What the folders may import, what the wheel holds, how the package looks from outside."""

import ast
import configparser
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hf_ensemble

ROOT = Path(__file__).parents[2]
# Stages may import what stands to their left.
ORDER = [
    "errors",
    "logging",
    "_text",
    "_values",
    "_files",
    "_locks",
    "_records",
    "_settings",
    "_compat",
    "_processes",
    "_clock",
    "_card_drafts",
    "_cards",
    "_hub",
    "tasks",
    "models",
    "store",
    "capture",
    "estimate",
    "select",
    "ensemble",
    "evaluate",
    "runs",
    "publish",
    "callbacks",
    "train",
    "cli",
]
FOLDERS = {"callbacks": ROOT / "callbacks", "model_cards": ROOT / "model_cards"}


def modules():
    """Every module's dotted name and file."""
    for path in sorted((ROOT / "hf_ensemble").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield parts[:-1] if parts[-1] == "__init__" else parts, path
    for name, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = ("hf_ensemble", name, *path.relative_to(folder).with_suffix("").parts)
            yield parts[:-1] if parts[-1] == "__init__" else parts, path


def imported(parts, path):
    """Stages that a module imports, wherever in it."""
    package = parts if path.name == "__init__.py" else parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            target = (*start, *(node.module.split(".") if node.module else ()))
            names = [(*target, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        for name in names:
            if name[0] == "hf_ensemble" and len(name) > 1 and not name[1].startswith("__"):
                yield name[1]


def test_imports_point_one_way():
    wrong, seen = [], set()
    for parts, path in modules():
        if len(parts) == 1 or parts[1] == "model_cards":
            continue
        for stage in imported(parts, path):
            seen.add((parts[1], stage))
            if ORDER.index(stage) > ORDER.index(parts[1]):
                wrong.append(f"{'.'.join(parts)} imports {stage}")
    assert wrong == []
    # The check itself sees imports.
    assert {("estimate", "store"), ("train", "publish"), ("callbacks", "capture"), ("cli", "train")} <= seen


def imported_modules(parts, path, known):
    """Modules of the library that a module imports at its top or for type checking, not inside of functions."""
    package = parts if path.name == "__init__.py" else parts[:-1]
    waiting = [*ast.parse(path.read_text()).body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.If, ast.Try)):
            waiting += [*node.body, *node.orelse]
        if not isinstance(node, ast.ImportFrom):
            continue
        start = package[: len(package) - node.level + 1] if node.level else ()
        target = (*start, *(node.module.split(".") if node.module else ()))
        for alias in node.names:
            yield (*target, alias.name) if (*target, alias.name) in known else target


def test_no_circle_of_modules():
    known = dict(modules())
    waits = {
        parts: {other for other in imported_modules(parts, path, known) if other in known and other != parts}
        for parts, path in known.items()
    }
    # Packages re-export what they hold: a module that imports its own package's sibling is no circle through it.
    waits = {p: {o for o in own if not (len(o) < len(p) and p[: len(o)] == o)} for p, own in waits.items()}
    assert sum(map(len, waits.values())) > 200
    while waits:
        free = [parts for parts, own in waits.items() if not own & set(waits)]
        assert free, f"circle among {sorted('.'.join(parts) for parts in waits)}"
        for parts in free:
            del waits[parts]


def test_packages_and_functions_stay_readable():
    files, long = {}, []
    for parts, path in modules():
        files.setdefault(path.parent, []).append(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                if length > 80:
                    long.append(f"{'.'.join(parts)}.{node.name}: {length} lines")
    assert {folder.name: len(own) for folder, own in files.items() if len(own) > 19} == {}
    assert long == []


def test_trainers_are_not_passed_as_any():
    untyped = []
    for parts, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            is_trainer = isinstance(node, ast.arg) and node.arg == "trainer"
            if is_trainer and (node.annotation is None or ast.unparse(node.annotation) == "Any"):
                untyped.append(f"{'.'.join(parts)}:{node.lineno}")
    assert untyped == []


def test_every_folder_is_in_the_packaging_map():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    found = {".".join(parts) for parts, path in modules() if path.name == "__init__.py"}
    assert listed == found
    assert set(FOLDERS) == {
        line.split("=")[0].strip().removeprefix("hf_ensemble.")
        for line in config["options"]["package_dir"].strip().splitlines()
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy: an isolated build would need a network, and a build in place leaves files in the checkout.
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_callbacks_and_templates_and_no_bare_names(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "hf_ensemble/py.typed",
        "hf_ensemble/callbacks/gradient_capture.py",
        "hf_ensemble/model_cards/ensemble_card.md.jinja",
        "hf_ensemble/model_cards/pictures.mplstyle",
        "hf_ensemble/model_cards/run_report.css",
        "hf_ensemble/model_cards/run_report.html.jinja",
        "hf_ensemble/model_cards/run_report.js",
        "hf_ensemble/cli/demo/world.py",
    } <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"hf_ensemble"}


def test_wheel_works_without_the_checkout(wheel, tmp_path):
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); import hf_ensemble; "
        "from hf_ensemble import GradientCaptureCallback; from importlib import resources; "
        "assert hf_ensemble.__file__.startswith(sys.path[0]); "
        "assert (resources.files('hf_ensemble.model_cards') / 'ensemble_card.md.jinja').read_text()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_imports_say_nothing():
    code = "from hf_ensemble import EnsembleSFTTrainer, PeftEnsembleModel, GradientCaptureCallback"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_import_is_lazy_and_every_public_name_resolves():
    code = (
        "import sys, hf_ensemble; heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets'} & set(sys.modules); "
        "assert not heavy, heavy; assert len(sys.modules) < 400"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in hf_ensemble.__all__:
        assert getattr(hf_ensemble, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hf_ensemble.nothing  # noqa: B018
