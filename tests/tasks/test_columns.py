"""Columns of one's own: what an error advises works as it is printed."""

import json
import re

import datasets
import pytest
import yaml
from datasets import Dataset

from hf_ensemble import TaskSet
from hf_ensemble.cli.main import main
from hf_ensemble.errors import TaskError
from hf_ensemble.tasks.rows import unknown_columns

ROWS = {
    "alpaca": [
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        {"instruction": "Say two.", "input": None, "output": "two"},
    ],
    "questions": [{"question": "1 + 1", "query": "sum", "answer": "2"}] * 2,
    "instructions": [{"instruction": "Add 1 and 1.", "output": "2"}] * 2,
    "reviews": [{"review": "good", "sentiment": 1}, {"review": "bad", "sentiment": 0}],
    "half": [{"text": "good", "category": "a"}, {"text": "bad", "category": "b"}],
}
FOUND = {
    "alpaca": {"prompt": "Add.\n1 + 1", "completion": "2"},
    "questions": {"prompt": "1 + 1", "completion": "2"},
    "instructions": {"prompt": "Add 1 and 1.", "completion": "2"},
    "reviews": {"text": "good", "label": 1},
    "half": {"text": "good", "label": 0},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def advised(rows):
    known = [("text", "label"), ("prompt", "completion")]
    return unknown_columns("mine", rows[0], known)


@pytest.mark.parametrize("name", ROWS)
def test_advice_in_python_works_as_printed(name):
    call = re.search(r"(?:Join|Rename) them: (?i:dataset)(\..*)\.$", str(advised(ROWS[name])))[1]
    made = eval(f"dataset{call}", {"dataset": Dataset.from_list(ROWS[name])})
    row = TaskSet.from_datasets({"mine": made})["mine"].splits["train"][0]
    assert {key: row[key] for key in FOUND[name]} == FOUND[name]


@pytest.mark.parametrize("name", ROWS)
def test_advice_in_a_terminal_works_as_printed(name, tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    line = ["run", "--model_name_or_path", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    if name != "half":
        assert main([*line, "--data", str(file)]) == 1
        said = capsys.readouterr().err.strip()
    else:
        said = advised(ROWS[name]).in_terminal
    config = re.search(r"--config file: (.*)\.$", said)[1].replace("...", str(file))
    (tmp_path / "run.yaml").write_text(config)
    assert list(yaml.safe_load(config)["datasets"]) == ["mine"]
    assert main([*line, "--config", str(tmp_path / "run.yaml")]) == 1
    assert "at least two datasets, found ['mine']" in capsys.readouterr().err


def test_columns_that_nobody_can_guess():
    error = unknown_columns("mine", ["a", "b"], [("prompt", "completion")])
    assert isinstance(error, TaskError)
    config = re.search(r"--config file: (.*)\.$", error.in_terminal)[1]
    mapping = yaml.safe_load(config)["datasets"]["mine"]["columns"]
    assert list(mapping.values()) == ["prompt", "completion"]
