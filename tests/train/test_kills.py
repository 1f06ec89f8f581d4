"""Runs that are killed by the system, and end as one that was not."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.kills.artefacts import differences
from benchmarks.kills.run import moments
from benchmarks.kills.table import table
from benchmarks.kills.workload import current_stage
from helpers.processes import run_python

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_killed_run_leaves_what_a_whole_one_leaves(tmp_path):
    code = "import runpy, sys; sys.path.insert(0, ''); runpy.run_module('benchmarks.kills.run', None, '__main__', True)"
    # In the calibrating training, where there are checkpoints.
    words = ["--flows", "ensemble", "--kills", "1", "--stages", "calibration:2"]
    done = run_python(code, str(tmp_path / "kills"), *words, folder=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    (kill,) = json.loads((tmp_path / "kills.json").read_text())["flows"]["ensemble"]["kills"]
    assert kill["stage"] == "calibration:2" and kill["differences"] == []


def test_kills_go_around_the_stages_in_both_ways():
    found = moments(["a", "b", "c"], 7)
    assert [stage for stage, _ in found] == ["a", "b", "c", "a", "b", "c", "a"]
    assert [by for stage, by in found if stage == "a"] == ["delay", "file", "delay"]
    assert [by for stage, by in found if stage == "b"] == ["file", "delay"]


def test_differences_are_named():
    expected = {"a.json": {"losses": [1.0, 2.0], "more": 1}, "b": "digest"}
    found = {"a.json": {"losses": [1.0, 3.0], "more": 1}, "c": "digest"}
    assert sorted(differences(expected, found)) == [
        "a.json: losses: 1: expected 2.0, found 3.0",
        "b: missing",
        "c: too many",
    ]
    assert not list(differences(expected, expected))


def test_the_stage_is_the_one_that_was_begun_last(tmp_path):
    assert current_stage(tmp_path) == "imports"
    for stages, expected in [
        ({}, "imports"),
        ({"gradients": "begun"}, "gradients"),
        ({"gradients": "done"}, "gradients"),
        ({"gradients": "done", "baseline": "begun"}, "baseline"),
        ({"gradients": "done", "weights": "done"}, "evaluation"),
    ]:
        record = {"stages": {name: {"status": status} for name, status in stages.items()}}
        (tmp_path / "run.json").write_text(json.dumps(record))
        assert current_stage(tmp_path) == expected


def test_the_table_counts_equal_ends():
    kill = {"stage": "imports", "by": "delay", "moment": "1 s", "differences": []}
    other = {"stage": "group", "by": "file", "moment": "os.rename run/groups.json", "differences": ["a: missing"]}
    flow = {"seconds": {"imports": 2.0, "group": 1.0}, "files": 30, "kills": [kill, other]}
    text = table({"flows": {"ensemble": flow}})
    assert "2 kills, after 1 of which all 30 files are equal" in text
    assert "| imports | 2.00 | 1 | 1 | 0 | 1 |" in text and "`a: missing`" in text
