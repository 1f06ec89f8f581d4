"""Scripts of others with a trainer of ours: trl's own here, transformers' by the benchmark."""

import json
import runpy
import sys
from pathlib import Path

import datasets
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.scripts.edits import SFT, changed_lines, edited
from benchmarks.scripts.inputs import SKILLS, write_sft
from benchmarks.scripts.run import INSTALLED_SFT, SFT_FLAGS, left_by_sft
from benchmarks.scripts.table import table
from hf_ensemble.runs import TasksRecord


def test_trls_own_script_makes_an_ensemble_after_five_lines(tmp_path, monkeypatch):
    write_sft(tmp_path)
    text = edited(INSTALLED_SFT.read_text(encoding="utf-8"), SFT)
    (tmp_path / "script.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py", *SFT_FLAGS.split(), "--report_to", "none"])
    runpy.run_path("script.py", run_name="__main__")
    left = left_by_sft(tmp_path / "run")
    assert left and all(left.values()), left
    tasks = TasksRecord.load(tmp_path / "run" / "tasks.json").tasks
    assert set(tasks) == set(SKILLS)
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())["scores"]["eval"]
    assert set(scores["ensemble"]) == set(scores["baseline"]) == set(SKILLS)


def test_edits_are_few_and_all_made():
    text = "a\nb\nc\n"
    assert edited(text, [("b", "x")]) == "a\nx\nc\n"
    assert changed_lines(text, "a\nx\ny\nc\n") == 2 and changed_lines(text, "a\n") == 2
    with pytest.raises(ValueError, match="Expected 'z' once in the script, found it 0 times"):
        edited(text, [("z", "x")])
    with pytest.raises(ValueError, match="at most 5 changed lines, found 6"):
        edited(text, [("b", "1\n2\n3\n4\n5\n6")])


def test_the_table_says_what_is_missing():
    ended = {"errors": []}
    left = {"errors": [], "trained": True, "saved": False}
    own = {"sha256": "0", "changed_lines": 4, "as it is": ended, "edited": left}
    failed = {**own, "edited": {"errors": ["first", "ValueError: a | b"]}}
    text = table({"scripts": {"one.py": own, "two.py": failed}})
    assert "| ended | trained, not saved |" in text and "`` ValueError: a \\| b ``" in text
