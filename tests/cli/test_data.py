"""From flags and `--config` files to tasks."""

import json

import pytest
import yaml

from helpers import toy
from helpers.task_files import write_rows, write_tasks
from hf_ensemble.cli.arguments import DataArguments
from hf_ensemble.cli.data import tasks_of
from hf_ensemble.cli.parsing import parse
from hf_ensemble.errors import ConfigurationError, TaskError


@pytest.fixture
def files(tmp_path):
    for name, word in {"a": "sum", "b": "diff"}.items():
        rows = [{"q": row["prompt"], "a": row["completion"]} for row in toy.sum_rows(10, 1, word)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def tasks(*flags):
    (arguments,), _ = parse([DataArguments], flags)
    return tasks_of(arguments)


def counts(found):
    return {name: {split: len(rows) for split, rows in task.splits.items()} for name, task in found.items()}


COLUMNS = {"q": "prompt", "a": "completion"}


def test_datasets_by_name_in_a_configuration_file(files):
    source = {"path": str(files / "a.jsonl"), "columns": COLUMNS}
    config = {"datasets": {"sums": {**source, "max_rows": 6, "validation": 2, "weight": 0.5}, "all": source}}
    (files / "run.yaml").write_text(yaml.safe_dump(config))
    found = tasks("--config", str(files / "run.yaml"))
    assert counts(found) == {"sums": {"train": 4, "validation": 2}, "all": {"train": 10}}
    assert found.sampling_weights == {"sums": 0.5, "all": 1.0}
    assert tasks("--config", str(files / "run.yaml"), "--tasks", "all", "--max_train_rows", "3").names == ("all",)


@pytest.mark.parametrize("key", ["datasets", "dataset_mixture"])
def test_mixtures_of_trl(files, key):
    entries = [{"path": str(files / f"{name}.jsonl"), "split": "train", "columns": COLUMNS} for name in "ab"]
    config = {"datasets": entries, "test_split_size": 0.5}
    (files / "trl.yaml").write_text(yaml.safe_dump(config if key == "datasets" else {key: config}))
    assert counts(tasks("--config", str(files / "trl.yaml"))) == {
        name: {"train": 5, "validation": 5} for name in ("a", "b")
    }
    if key == "dataset_mixture":
        (files / "trl.yaml").write_text(yaml.safe_dump({key: {**config, "streaming": True}}))
        with pytest.raises(ConfigurationError, match="Streaming is not for the command line"):
            tasks("--config", str(files / "trl.yaml"))


def test_folders_files_and_names(tmp_path):
    folder = write_tasks(tmp_path / "data", toy.sft_tasks())
    assert set(tasks("--data", folder)) == set(toy.sft_tasks())
    one = f"{folder}/sums"
    assert set(tasks("--data", one, f"{folder}/diffs")) == {"sums", "diffs"}
    named = tasks("--data", f"x={one}", f"y={folder}/diffs/train.jsonl")
    assert {name: set(task.splits) for name, task in named.items()} == {
        "x": {"train", "validation", "test"},
        "y": {"train"},
    }
    with pytest.raises(TaskError, match="holds the splits of one dataset") as raised:
        tasks("--data", one)
    assert "--data NAME=FOLDER" in raised.value.in_terminal
    assert counts(tasks("--data", f"y={folder}/diffs/train.jsonl", "--test_split_size", "0.25"))["y"] == {
        "train": 9,
        "validation": 3,
    }
    for flags, message in {
        ("--data", f"x={one}", f"x={one}"): "Expected different names in --data",
        ("--data", one, "--datasets", "{}"): r"found \['data', 'datasets'\]",
        ("--datasets", '{"a": '): "datasets has to be JSON",
        ("--dataset_mixture", "[]"): "dataset_mixture has to be a mapping with datasets",
        (
            "--test_split_size",
            "1",
            "--data",
            folder,
        ): "has to be a share .* above 0 and below 1, found 1",
        (
            "--dataset_mixture",
            '{"datasets": ["a.csv"], "test_split_size": 20}',
        ): "size of dataset_mixture has",
        ("--dataset_mixture", '{"datasets": ["a.csv"], "test_size": 0.1}'): r"unknown keys \['test_size'\]; known are",
    }.items():
        with pytest.raises(ConfigurationError, match=message):
            tasks(*flags)
    with pytest.raises(TaskError, match=r"No dataset named \['z'\]; the datasets are \['x'\]"):
        tasks("--data", f"x={one}", "--tasks", "z")


def test_a_list_of_datasets_on_the_command_line(files):
    entries = [{"path": str(files / f"{name}.jsonl"), "columns": COLUMNS} for name in "ab"]
    assert counts(tasks("--datasets", json.dumps(entries))) == {"a": {"train": 10}, "b": {"train": 10}}
    assert counts(tasks("--datasets", *map(json.dumps, entries))) == {"a": {"train": 10}, "b": {"train": 10}}
    assert counts(tasks("--datasets", json.dumps(entries[0]))) == {"a": {"train": 10}}
    assert counts(tasks("--datasets", json.dumps({"mine": entries[0]}))) == {"mine": {"train": 10}}


def test_a_share_is_held_out_of_folders_and_mixtures_alike(files):
    for name in ("a", "b"):
        write_rows(files / "data" / f"{name}.jsonl", toy.sum_rows(10, 1))
    mixture = {"datasets": [str(files / "data" / f"{name}.jsonl") for name in "ab"], "test_split_size": 0.5}
    for flags, held_out in {
        ("--data", str(files / "data"), "--test_split_size", "0.2"): 2,
        ("--dataset_mixture", json.dumps(mixture)): 5,
        # The command line has the last word.
        ("--dataset_mixture", json.dumps(mixture), "--test_split_size", "0.3"): 3,
        ("--dataset_mixture", json.dumps(mixture), "--max_validation_rows", "4"): 4,
    }.items():
        expected = {"train": 10 - held_out, "validation": held_out}
        assert counts(tasks(*flags)) == {"a": expected, "b": expected}
    write_rows(files / "data" / "a.jsonl", toy.sum_rows(1, 1))
    with pytest.raises(TaskError, match="'a': expected at least 2 rows to hold one out, found 1"):
        tasks("--data", str(files / "data"), "--test_split_size", "0.2")
