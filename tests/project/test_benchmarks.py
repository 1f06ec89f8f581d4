"""Every study can be started, its tables are those of its JSON, and what documents say of it is there."""

import dataclasses
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from trl import ModelConfig

from hf_ensemble.cli.arguments import FidelityArguments, FlowArguments
from hf_ensemble.train import EnsembleConfig, EnsembleSFTConfig

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
README = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
RESULTS = sorted(BENCHMARKS.glob("*/*.json"))
STUDIES = sorted({path.parent.name for path in RESULTS})
SCRIPTS = [f"benchmarks.{study}.run" for study in STUDIES] + [
    "benchmarks.inputs.corrupt_tasks",
    "benchmarks.inputs.lettered_choices",
    "benchmarks.inputs.small_llama",
    "benchmarks.tables",
]
# Flags that studies pass on, and keys of their YAML files.
PASSED_ON = {"config"} | {
    field.name
    for owner in (FidelityArguments, FlowArguments, ModelConfig, EnsembleConfig, EnsembleSFTConfig)
    for field in dataclasses.fields(owner)
}


def texts():
    """Every text file of the benchmarks, and the documents that name them."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    files += [path for path in BENCHMARKS.rglob("*") if path.suffix in (".md", ".py", ".yaml", ".json")]
    return [(path, path.read_text(encoding="utf-8")) for path in sorted(files)]


@pytest.fixture(autouse=True)
def repository_root(monkeypatch):
    """Scripts run from the repository root."""
    monkeypatch.syspath_prepend(str(ROOT))


def script_file(module: str) -> str:
    return str(ROOT.joinpath(*module.split(".")).with_suffix(".py"))


@pytest.fixture
def help_of(monkeypatch, capsys):
    """What a script prints for `--help`."""

    def run(module: str) -> str:
        monkeypatch.setattr(sys, "argv", [script_file(module), "--help"])
        with pytest.raises(SystemExit) as stopped:
            importlib.import_module(module).main()
        assert stopped.value.code == 0
        return capsys.readouterr().out

    return run


def test_every_folder_is_a_study_or_holds_inputs():
    folders = {path.name for path in BENCHMARKS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*STUDIES, "inputs"}
    for study in STUDIES:
        assert {"run.py", "table.py"} <= {path.name for path in (BENCHMARKS / study).iterdir()}, study


def test_every_study_and_result_is_in_the_readme():
    for path in RESULTS:
        assert f"]({path.relative_to(BENCHMARKS).with_suffix('.md')})" in README, f"README.md does not link {path}"
    for study in STUDIES:
        assert f"`{study}`" in README, study


@pytest.mark.parametrize("module", SCRIPTS)
def test_scripts_answer_help(module, help_of):
    printed = help_of(module)
    assert printed.startswith(f"usage: python -m {module} ")
    # The docstring follows, with the command as one types it.
    assert printed.count(f"python -m {module}") > 1


def test_tables_are_those_of_the_json():
    tables = dict(importlib.import_module("benchmarks.tables").tables())
    assert set(tables) == {path.with_suffix(".md") for path in RESULTS}
    for path, text in tables.items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run python -m benchmarks.tables"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_stated_commands_are_those_of_the_scripts(path, help_of):
    target, module = path.relative_to(ROOT).with_suffix(""), f"benchmarks.{path.parent.name}.run"
    known = set(re.findall(r"--(\w+)", help_of(module)))
    if "FLAGS" in importlib.import_module(module).__doc__:
        known |= PASSED_ON
    commands = json.loads(path.read_text(encoding="utf-8"))["commands"]
    assert commands
    for command in commands:
        words = shlex.split(command)
        assert words[:4] == ["python", "-m", module, str(target)]
        assert {word[2:] for word in words if word.startswith("--")} <= known


def test_configurations_hold_known_flags():
    for path in BENCHMARKS.glob("*/*.yaml"):
        assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) <= PASSED_ON, path


def test_named_paths_and_modules_exist():
    seen = 0
    for path, text in texts():
        for name in re.findall(r"(?<![\w./-])(?:\.\./)?(benchmarks/[\w./-]*\w)", text):
            seen += 1
            assert (ROOT / name).exists() or (ROOT / f"{name}.json").exists(), f"{path} names {name}"
        for module in re.findall(r"python -m (benchmarks[.\w]*\w)", text):
            assert Path(script_file(module)).is_file(), f"{path} names {module}"
        # Scripts import each other as parts of a package.
        assert not re.search(r"python benchmarks/", text), f"{path} runs a script by its path"
    assert seen > 50


def test_links_lead_somewhere():
    for path in BENCHMARKS.rglob("*.md"):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{path} links to {link}"


def test_no_path_of_a_machine():
    for path, text in texts():
        if path.is_relative_to(BENCHMARKS):
            # `/proc` is the same on every machine.
            found = re.search(r"(?<![\w.*])/(?!proc/)\w+/[\w./-]+", text)
            assert found is None, f"{path} names {found and found.group()}"


def test_results_of_another_shape_are_not_added_to(tmp_path):
    common = importlib.import_module("benchmarks.common")
    for results in ({"dim": 8, "lines": [1]}, {"shape": {"dim": 8}, "models": {}}):
        (tmp_path / "kept.json").write_text(json.dumps(results))
        assert common.read_results(tmp_path / "kept") == common.read_results(tmp_path / "kept", dim=8) == results
        assert common.read_results(tmp_path / "kept", dim=9) == common.read_results(tmp_path / "none", dim=8) == {}
    # The committed ones are those of the studies' own arguments.
    for study, shape in (("capture", {"batch": 8, "rank": None}), ("task_scale", {"budget": 2.0, "dim": 400})):
        assert common.read_results(BENCHMARKS / study / "results", **shape)


def test_lines_of_another_shape_are_measured_anew(monkeypatch, tmp_path):
    study = importlib.import_module("benchmarks.captured_rows.run")
    monkeypatch.setattr(study, "draw", lambda *_: None)
    sizes = "--tasks 4 --validation_rows 20 --dim 8 --captured_dim 8 --counts 10 --seeds 1"

    def lines(rows):
        monkeypatch.setattr(sys, "argv", [study.__file__, str(tmp_path / "rows"), "--rows", str(rows), *sizes.split()])
        study.main()
        return json.loads((tmp_path / "rows.json").read_text())["lines"]

    first = lines(40)
    assert len(first) == 3 and lines(40) == first
    other = lines(60)
    assert len(other) == 3 and other[0]["error"] != first[0]["error"]
