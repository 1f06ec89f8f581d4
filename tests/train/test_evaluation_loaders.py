"""Evaluations and predictions over several datasets have every row in its order, whatever the training's loaders do."""

import time

import numpy as np
import pytest
from datasets import Dataset

from helpers import toy
from helpers.trainers import sft_config, sft_trainer, split, without_speed
from hf_ensemble import EnsembleSFTTrainer

COUNT = 11
TASKS = toy.sft_tasks(12, COUNT)
GROUPED = {"train_sampling_strategy": "group_by_length", "per_device_eval_batch_size": 3}
CUT = {"dataloader_drop_last": True}


def mixed_rows():
    """The validation rows of all tasks in turn, and the place of each in its task."""
    places = [(task, number) for number in range(COUNT) for task in TASKS]
    return Dataset.from_list([TASKS[task]["validation"][number] | {"task": task} for task, number in places]), places


def labels_of(trainer, places, width):
    rows = [trainer.eval_dataset[task][number]["labels"] for task, number in places]
    return np.array([row + [-100] * (width - len(row)) for row in rows])


def union(folder, **changes):
    """A trainer of one model on all tasks."""
    validation = {name: Dataset.from_list(rows) for name, rows in split(TASKS, "validation").items()}
    names = [name for name in ("compute_metrics", "eval_dataset") if name in changes]
    given = {"eval_dataset": validation} | {name: changes.pop(name) for name in names}
    return EnsembleSFTTrainer(
        model=toy.llama(),
        args=sft_config(folder, **changes),
        train_dataset=split(TASKS, "train"),
        processing_class=toy.tokenizer(),
        **given,
    )


def count_rows(prediction):
    return {"rows": len(prediction.predictions)}


@pytest.mark.parametrize("changes", [GROUPED, CUT], ids=lambda changes: next(iter(changes)))
def test_rows_are_predicted_in_the_order_that_they_are_given_in(tmp_path, base_folder, changes):
    trainer = sft_trainer(tmp_path / "run", base_folder, TASKS, **changes)
    rows, places = mixed_rows()
    before = trainer.predict(rows)
    assert before.predictions.shape[:2] == before.label_ids.shape
    assert np.array_equal(before.label_ids, labels_of(trainer, places, before.label_ids.shape[1]))
    # What predicts once the run is trained.
    tables = trainer._tables(rows)
    after = trainer._prediction_trainer(tables).predict_tasks(tables)
    in_turn = sorted(places, key=lambda place: list(TASKS).index(place[0]))
    assert np.array_equal(after.label_ids, labels_of(trainer, in_turn, after.label_ids.shape[1]))


def test_batches_of_several_workers_come_in_their_order(tmp_path, base_folder):
    changes = {"dataloader_num_workers": 2, "dataloader_in_order": False, "per_device_eval_batch_size": 6}
    trainer = sft_trainer(tmp_path / "run", base_folder, TASKS, **changes)
    inner = trainer._prediction_trainer(trainer.eval_dataset)
    rows, collate = trainer.eval_dataset["sums"], inner.data_collator.collator

    def slow_at_first(batch):
        time.sleep(0.5 if batch[0]["input_ids"] == rows[0]["input_ids"] else 0)
        return collate(batch)

    inner.data_collator.collator = slow_at_first
    for loader in (inner.get_eval_dataloader("sums"), inner.get_test_dataloader(rows)):
        assert [name for batch in loader for name in batch["example_id"]] == rows["example_id"]


def test_metrics_are_of_every_row_in_a_run(tmp_path, base_folder):
    trainer = sft_trainer(tmp_path / "run", base_folder, TASKS, per_device_train_batch_size=5, **CUT)
    trainer.compute_metrics = count_rows
    inner = trainer._prediction_trainer(trainer.eval_dataset)
    assert inner.computed_metrics("sums") == {"rows": COUNT}
    metrics = inner.evaluate()
    assert {metrics[f"eval_{task}_rows"] for task in TASKS} == {COUNT}
    # The training's own loader is as it is asked for.
    assert len(inner.get_train_dataloader()) == 36 // 5


@pytest.mark.parametrize(
    "changes",
    [
        {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss"},
        {"task_loss_weighting": "convergence"},
    ],
    ids=["best_model", "convergence"],
)
def test_tasks_of_less_than_a_batch_are_evaluated_within_trainings(tmp_path, changes):
    changes = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 16} | changes
    trainer = union(tmp_path / "run", compute_metrics=count_rows, **CUT, **changes)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(entries) == 2
    assert all(entry[f"eval_{task}_rows"] == COUNT for entry in entries for task in TASKS)


def test_one_set_of_evaluation_rows_is_whole_for_one_model(tmp_path):
    rows = Dataset.from_list(TASKS["sums"]["validation"])
    trainer = union(tmp_path / "run", eval_dataset=rows, compute_metrics=count_rows, **CUT, **GROUPED)
    assert trainer.evaluate()["eval_rows"] == COUNT
    output = trainer.predict(trainer.eval_dataset)
    for labels, row in zip(output.label_ids, trainer.eval_dataset, strict=True):
        assert [label for label in labels if label != -100] == [label for label in row["labels"] if label != -100]


def test_persistent_workers_do_not_answer_with_another_datasets_rows(tmp_path, base_folder):
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = sft_trainer(tmp_path / "run", base_folder, TASKS, **workers)
    # A loader of the run's own trainer, whose attributes every other gets.
    assert len(list(trainer.get_eval_dataloader("sums"))) == 2
    inner = trainer._prediction_trainer({name: rows.select(range(4)) for name, rows in trainer.eval_dataset.items()})
    given = {name: trainer.eval_dataset[name].select([number]) for number, name in enumerate(("sums", "diffs"))}
    found = [inner.evaluate(given), inner.evaluate()]
    inner.args.dataloader_num_workers, inner.args.dataloader_persistent_workers = 0, False
    expected = [inner.evaluate(given), inner.evaluate()]
    for own, wanted in zip(found, expected):
        assert without_speed(own) == pytest.approx(without_speed(wanted)) and "eval_sums_loss" in own
    assert found[0]["eval_sums_loss"] != pytest.approx(found[0]["eval_diffs_loss"], rel=1e-4)
