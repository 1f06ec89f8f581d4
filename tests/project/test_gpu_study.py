"""The study of a GPU runs at toy sizes on the CPU, and its script goes on after a part that fails."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.gpu.run")


def test_every_part_runs_at_toy_sizes(study, monkeypatch, tmp_path, capsys):
    # The larger model is the same at toy sizes.
    wanted = [part for part in study.PARTS if part != "capture_34b"]
    arguments = [str(tmp_path / "tiny"), "--device", "cpu", "--tiny", "--parts", *wanted]
    monkeypatch.setattr(sys, "argv", [study.__file__, *arguments])
    monkeypatch.setattr(study.capture, "TURNS", 1)
    study.main()
    found = json.loads((tmp_path / "tiny.json").read_text())
    parts = found["parts"]
    ways = parts["capture_8b"]["ways"]
    assert set(ways) == {"forward and backward", "with activation checkpointing", "capture"}
    assert parts["capture_8b"]["store"]["rows"] == 4 and all(way["kernels"] for way in ways.values())
    assert parts["estimator"]["loss_difference"] < 1e-6
    assert "| ensemble, all at once |" in (tmp_path / "tiny.md").read_text()
    # Parts of another machine say so.
    assert study.table(found).count("CPU threads; wall times.") == 1
    parts["estimator"]["machine"] = {**parts["estimator"]["machine"], "device": "another GPU"}
    text = study.table(found)
    assert text.count("CPU threads; wall times.") == len(wanted) and "## Estimator\n\nanother GPU, " in text


def run_script(folder, code, *arguments):
    """The script with a Python that only notes what it is asked for, and answers by `code`."""
    python = folder / "python"
    python.write_text(f'#!/usr/bin/env bash\necho "asked: $*"\n{code}\n')
    python.chmod(0o755)
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(folder / "out"), *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True)


def test_a_part_that_fails_does_not_stop_the_others(tmp_path):
    done = run_script(tmp_path, 'case "$*" in *capture_34b*) exit 3 ;; *decoding*) exit 1 ;; esac')
    assert done.returncode == 3
    log = (tmp_path / "out" / "log.txt").read_text()
    for part in ("capture_8b", "estimator", "tests"):
        assert f"== {part}: status 0" in log
    assert "== capture_34b: status 3" in log and "== decoding: status 1" in log
    asked = next(line for line in log.splitlines() if "-m pytest" in line)
    assert "-m gpu --numprocesses 4" in asked and "tests/capture/test_capture_gpu.py" in asked


def test_toy_sizes_take_one_process_and_no_tests(tmp_path):
    done = run_script(tmp_path, "", "--device", "cpu", "--tiny")
    assert done.returncode == 0 and done.stdout.count("asked:") == 1 and "--device cpu --tiny" in done.stdout


@pytest.mark.parametrize("arguments", [["--sizes"], []])
def test_bad_arguments_are_named(arguments):
    done = subprocess.run(["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("Expected ")
