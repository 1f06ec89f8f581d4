"""File names of a run are known in one place."""

import ast
from pathlib import Path

import hf_ensemble
from hf_ensemble.runs import FidelityReport, RunDirectory, TasksRecord, layout

ROOT = Path(hf_ensemble.__file__).parent
# Names of this kind are too plain to search for: other things than a run's folders are called so as well.
_PLAIN = {"gradients", "baseline", "adapter", "ensemble", "base", "training", "meta", "estimate"}


def strings(path):
    """String literals of a module that are no docstrings."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_no_other_module_names_a_file_of_a_run():
    names = {part for name in layout.RECORDS.values() for part in (name, name.rsplit("/")[-1])}
    names |= {layout.SCORED_RUNS, layout.FIDELITY_PICTURE, layout.COMPARISON_TABLE}
    assert {"run.json", "groups.json", "results.json"} <= names and not names & _PLAIN
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in [*ROOT.rglob("*.py"), *(ROOT.parent / "callbacks").glob("*.py")]
        if "runs" not in path.relative_to(ROOT.parent).parts
        for text in strings(path)
        for name in names
        if name in text
    }
    assert found == set()


def test_what_a_changed_run_does_not_share_is_deleted(tmp_path):
    RunDirectory.open(tmp_path, {"a": 1}, {"b": 2})
    chosen = [*(layout.RECORDS[kind] for kind in layout.CHOICE_RECORDS), "comparison.md", "report.html"]
    chosen += [f"{folder}/file" for folder in ("ensemble/adapters/x", "adapter", "compared/x")]
    basic = [layout.RECORDS[kind] for kind in (TasksRecord, FidelityReport)] + ["training/x.json"]
    basic += [f"{folder}/file" for folder in ("gradients", "gradients_at_baseline", "baseline", "meta", "scored_runs")]

    def left():
        return {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}

    for name in [*chosen, *basic]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    RunDirectory.open(tmp_path, {"a": 1}, {"b": 3}, overwrite=True)
    assert left() == {*basic, "run.json", ".record.lock"}
    RunDirectory.open(tmp_path, {"a": 2}, {"b": 3}, overwrite=True)
    assert left() == {"run.json", ".record.lock"}
    # A kill in between leaves the record that says what else lies there.
    assert layout.BASIC_ARTEFACTS[-1] == "run.json"


def test_every_record_has_its_own_place_and_format():
    assert len(set(layout.RECORDS.values())) == len(layout.RECORDS)
    assert len({kind.format for kind in layout.RECORDS}) == len(layout.RECORDS)
