"""What a card shows of a task: a prompt, and the dataset of the Hub that its rows come from."""

from types import SimpleNamespace

import pytest

from helpers import toy
from hf_ensemble import TaskSet
from hf_ensemble.tasks.presentation import example_prompt, hub_datasets

CHAT = [{"role": "user", "content": "sum : 1 + 1 ="}, {"role": "assistant", "content": "2"}]


def shown(rows, validation=None):
    return example_prompt(TaskSet.from_datasets({"task": rows}, validation and {"task": validation})["task"])


def test_the_shortest_prompt_of_the_first_validation_rows_is_shown():
    rows = [{"prompt": "a long prompt :", "completion": " x"}, {"prompt": "short :", "completion": " y"}]
    assert shown(toy.sum_rows(4), rows) == "short :"
    assert shown([{"messages": CHAT}]) == CHAT[:1]
    assert shown([{"prompt": CHAT[:1], "completion": CHAT[1:]}]) == CHAT[:1]
    assert shown(toy.text_rows(4)).startswith("the film")
    assert shown([{"prompt": "x" * 601, "completion": " y"}]) is None
    assert shown([{"input_ids": [1, 2], "labels": [1, 2]}]) is None


@pytest.mark.parametrize(
    "folder, downloaded, expected",
    [
        ("openai___gsm8k/main/0.0.0/abc", ["datasets--openai--gsm8k"], ["openai/gsm8k"]),
        ("SetFit___cr/default", ["datasets--SetFit--CR", "datasets--SetFit--mr"], ["SetFit/CR"]),
        # Two ids of one folder's name, an id that is not known, and local files.
        ("a___bool_q/default", ["datasets--a--BoolQ", "datasets--a--bool_q"], []),
        ("openai___gsm8k/main", [], []),
        ("json/default-abc/0.0.0", ["datasets--openai--gsm8k"], []),
    ],
)
def test_ids_of_the_hubs_datasets(tmp_path, monkeypatch, folder, downloaded, expected):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in downloaded:
        (tmp_path / "hub" / name).mkdir(parents=True)
    table = SimpleNamespace(cache_files=[{"filename": str(tmp_path / "datasets" / folder / "train.arrow")}])
    elsewhere = SimpleNamespace(cache_files=[{"filename": str(tmp_path / "mine.arrow")}])
    assert hub_datasets([table, elsewhere]) == expected
