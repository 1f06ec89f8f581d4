"""What trl's own tests are run on: datasets cut in two, and rows of the lengths that they count."""

import sys
from pathlib import Path

import pytest
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.trl_suite.plugin import in_two_tasks
from benchmarks.trl_suite.rows import SPLITS, write_datasets
from benchmarks.trl_suite.table import table
from benchmarks.trl_suite.tokenizers import CHATML, make_tokenizer


@pytest.mark.parametrize("rows, first, second", [(5, [0, 1], [2, 3, 4]), (2, [0], [1]), (1, [0], [0])])
def test_a_dataset_is_cut_in_two(rows, first, second):
    dataset = Dataset.from_dict({"number": list(range(rows))})
    for whole in (dataset, dataset.to_iterable_dataset()):
        parts = {task: [row["number"] for row in part] for task, part in in_two_tasks(whole).items()}
        assert parts == {"data1": first, "data2": second}


@pytest.mark.parametrize("given", [None, {"data1": 1}])
def test_what_is_no_single_dataset_stays(given):
    assert in_two_tasks(given) is given


def test_rows_have_the_length_that_packing_is_counted_with(tmp_path):
    tokenizer = make_tokenizer(CHATML)
    for sentence in (*SPLITS["train"], *SPLITS["test"]):
        assert len(tokenizer(sentence)["input_ids"]) == 8, sentence
    assert {split: len(sentences) for split, sentences in SPLITS.items()} == {"train": 17, "test": 2}
    names = write_datasets(tmp_path)
    assert all(list((tmp_path / name).glob("*/train.parquet")) for name in names)


def test_the_table_counts_what_runs_and_names_what_differs():
    passed, skipped = {"outcome": "passed"}, {"outcome": "skipped", "reason": "no GPU"}
    failed = {"outcome": "failed", "reason": "ValueError: no"}
    results = {
        "tests": {"file": "tests/test_sft_trainer.py", "sha256": "0", "commit": "unknown"},
        "versions": {"trl": "1"},
        "seconds": {"parent": 1, "single": 2},
        "modes": {
            "parent": {"test_a": passed, "test_b": passed, "test_c": failed, "test_d": skipped},
            "single": {"test_a": passed, "test_b": failed, "test_c": failed, "test_d": skipped},
        },
    }
    text = table(results)
    assert "4 tests of `SFTTrainer`, of which 3 run" in text
    assert "| 2 | 1 | 1 |" in text and "| 1 | 2 | 2 |" in text
    assert text.count("`test_b`") == 1 and text.count("`test_c`") == 1
    assert "| no GPU | 1 |" in text
