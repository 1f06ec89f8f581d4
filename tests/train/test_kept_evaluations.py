"""Which evaluations a finished run keeps, and in which order it predicts rows."""

import numpy as np
import pytest
from datasets import Dataset

from helpers import toy
from helpers.trainers import sft_trainer, text_trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    trainer = sft_trainer(folder / "run", toy.save_model(toy.llama(), folder / "base"), num_groups=2)
    trainer.train()
    return trainer


def card_of(trainer):
    return (trainer.run_directory.ensemble / "README.md").read_text()


def test_evaluations_of_other_rows_leave_the_runs_own_alone(finished):
    report, card, costs = finished.report(), card_of(finished), finished.run_directory.record.stages
    name = list(finished.tasks)[0]
    rows = toy.sft_tasks()[name]["train"]
    for given in (name, {name: rows}, {task: splits["train"] for task, splits in toy.sft_tasks().items()}):
        assert finished.evaluate(given)[f"eval_{name}_loss"] > 0
        assert finished.report() == report and card_of(finished) == card
        assert finished.run_directory.record.stages == costs
    assert set(finished.evaluate()) >= {f"eval_{task}_loss" for task in finished.tasks}
    assert finished.report().scores == report.scores


def test_scores_of_some_tasks_do_not_take_the_place_of_those_of_more(finished):
    rows = {task: splits["train"] for task, splits in toy.sft_tasks().items()}
    name = list(rows)[0]
    own = finished.report()
    finished.evaluate({name: rows[name]}, metric_key_prefix="test")
    # The report stays that of all tasks.
    assert (finished.report().scores, finished.report().verdict) == (own.scores, own.verdict)
    finished.evaluate(rows, metric_key_prefix="test")
    whole = finished.report()
    assert set(whole.scores["ensemble"]) == set(rows) and whole.scores != own.scores
    finished.evaluate({name: rows[name]}, metric_key_prefix="test")
    assert finished.report() == whole


def test_predictions_are_in_the_order_of_a_list_too(tmp_path):
    tasks = toy.text_tasks()
    trainer = text_trainer(tmp_path / "run", toy.bert(4), tasks)
    names = list(tasks)
    mixed = [
        {**row, "task": name}
        for rows in zip(*(tasks[name]["validation"] for name in names))
        for name, row in zip(names, rows)
    ]
    found, expected = trainer.predict(mixed), trainer.predict(Dataset.from_list(mixed))
    assert np.array_equal(found.label_ids, expected.label_ids)
    assert np.allclose(found.predictions, expected.predictions)


def test_rows_that_are_left_out_of_predictions_are_said(finished, caplog, monkeypatch):
    monkeypatch.setattr(finished.args, "max_length", 10)
    tasks = toy.sft_tasks()
    rows = [{**splits["validation"][0], "task": name} for name, splits in tasks.items()]
    rows.insert(1, {**rows[0], "prompt": "sum " * 20})
    output = finished.predict(Dataset.from_list(rows))
    assert len(output.label_ids) == len(rows) - 1
    assert f"1 of {len(rows)} rows have no answer within max_length and are left out" in caplog.text
