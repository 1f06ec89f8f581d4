"""Rows are drawn as the arguments say, and predictions are of trainings that draw them so."""

from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import HfArgumentParser

from helpers import toy
from helpers.trainers import SMALL, sft_config, sft_trainer, split
from hf_ensemble import EnsembleConfig, EnsembleSFTConfig, EnsembleSFTTrainer, SelectionSFTConfig, TaskSet
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.tasks import TASK
from hf_ensemble.train.configs import BalancingArguments
from hf_ensemble.train.task_trainer import TaskSFTTrainer

SIZES = {"sums": (8, "sum"), "diffs": (16, "diff"), "more": (24, "sum")}
TASKS = {
    name: {"train": toy.sum_rows(count, 1, word), "validation": toy.sum_rows(4, 2, word)}
    for name, (count, word) in SIZES.items()
}


def one_model(folder, callbacks=None, trainer_class=EnsembleSFTTrainer, train=TASKS, **changes):
    """A trainer of one model on all tasks."""
    return trainer_class(
        model=toy.llama(),
        args=sft_config(folder, **changes),
        train_dataset=split(TASKS, "train") if train is TASKS else train,
        eval_dataset={name: Dataset.from_list(rows) for name, rows in split(TASKS, "validation").items()},
        processing_class=toy.tokenizer(),
        callbacks=callbacks,
    )


@pytest.fixture
def batches(monkeypatch):
    """Tasks and tokens of every row that is trained on, batch by batch."""
    seen = []
    step = TaskSFTTrainer.training_step

    def watched(self, model, inputs, *args, **kwargs):
        seen.append(list(zip(inputs[TASK], map(tuple, inputs["input_ids"].tolist()))))
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(TaskSFTTrainer, "training_step", watched)
    return seen


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"task_sampling": "uniform"}, ["sums", "more"]),
        ({"task_sampling": "temperature", "train_sampling_strategy": "group_by_length"}, list(TASKS)),
    ],
    ids=["uniform", "temperature"],
)
def test_draws_and_steps_are_those_that_predictions_assume(tmp_path, base_folder, batches, changes, names):
    changes = {"num_train_epochs": 5, "calibration_runs": 0, "train_baseline": False, **changes}
    trainer = sft_trainer(tmp_path / "run", base_folder, TASKS, **changes)
    estimator = trainer.selector().estimator
    weights = dict(zip(estimator.task_names, estimator.sampling_weights))
    trained = trainer.flow.training.run("one", names, tmp_path / "adapter")
    drawn = Counter(task for batch in batches for task, _ in batch)
    expected = {task: weights[task] * SIZES[task][0] for task in names}
    share = {task: count / sum(drawn.values()) for task, count in drawn.items()}
    assert share == pytest.approx({task: own / sum(expected.values()) for task, own in expected.items()}, abs=0.02)
    assert trained.global_step == trainer.flow.training.num_steps(names)
    assert sum(drawn.values()) == 5 * round(sum(expected.values()) / max(weights[task] for task in names))


def test_packed_rows_are_drawn_by_task_too(tmp_path, base_folder):
    changes = {"task_sampling": "uniform", "packing": True, "max_length": 24, "num_train_epochs": 2}
    trainer = sft_trainer(tmp_path / "run", base_folder, TASKS, **changes)
    packs = trainer.num_drawn_rows()
    assert packs["more"] > packs["sums"]
    drawn = {task: weight * packs[task] for task, weight in trainer.tasks.sampling_weights.items()}
    assert list(drawn.values()) == pytest.approx([packs["sums"]] * 3)
    trainer.open_run()
    trained = trainer.flow.training.run("one", list(TASKS), tmp_path / "adapter")
    assert trained.global_step == trainer.flow.training.num_steps(list(TASKS))


def test_one_model_on_all_datasets_draws_by_the_arguments(tmp_path, batches):
    trainer = one_model(tmp_path, task_sampling="uniform", num_train_epochs=1)
    trainer.train()
    assert Counter(task for batch in batches for task, _ in batch) == dict.fromkeys(TASKS, 8)
    batches.clear()
    one_model(tmp_path, sample_with_replacement=True, num_train_epochs=1).train()
    rows = Counter(row for batch in batches for row in batch)
    assert sum(rows.values()) == 48 and Counter(task for task, _ in rows.elements())["more"] != 24


@pytest.mark.parametrize("changes", [{"task_sampling": "uniform"}, {"train_sampling_strategy": "group_by_length"}])
def test_the_order_is_that_of_data_seed(tmp_path, changes):
    trainer, orders = one_model(tmp_path, **changes), []
    for seed, data_seed in ((1, None), (2, 1), (1, 2)):
        trainer.args.seed, trainer.args.data_seed = seed, data_seed
        orders.append(list(trainer._get_train_sampler()))
    assert orders[0] == orders[1] != orders[2]


def test_weights_are_those_of_the_arguments_or_of_the_tasks(tmp_path, base_folder):
    weighted = TaskSet.from_datasets(TASKS, sampling_weights={"diffs": 3.0})
    given = one_model(tmp_path / "a", sampling_weights={"diffs": 3.0})
    assert given.tasks.sampling_weights == weighted.sampling_weights == given.sampling_weights
    with pytest.raises(ConfigurationError, match="TaskSet or in the arguments, found both.*Leave one of them out"):
        one_model(tmp_path / "b", train=weighted, sampling_weights={"sums": 2.0})
    with pytest.raises(ConfigurationError, match=r"Unknown tasks in sampling_weights \['z'\]; the tasks are"):
        one_model(tmp_path / "b", sampling_weights={"z": 2.0})
    with pytest.raises(ConfigurationError, match="sample_with_replacement=True is about .* several datasets"):
        one_model(tmp_path / "b", train={"sums": Dataset.from_list(toy.sum_rows(8))}, sample_with_replacement=True)


def test_orders_of_all_rows_do_not_go_with_drawn_ones(tmp_path):
    message = "train_sampling_strategy='sequential' orders all rows.*'random', 'group_by_length'"
    for changes in (
        {"task_sampling": "uniform"},
        {"sample_with_replacement": True},
        {"sampling_weights": {"sums": 2.0}},
    ):
        with pytest.raises(ConfigurationError, match=message):
            sft_config(tmp_path, train_sampling_strategy="sequential", **changes)
    weighted = TaskSet.from_datasets(TASKS, sampling_weights={"diffs": 3.0})
    with pytest.raises(ConfigurationError, match=message):
        one_model(tmp_path, train=weighted, train_sampling_strategy="sequential")
    mixture = {"selection_method": "mixture"}
    with pytest.raises(ConfigurationError, match="train_sampling_strategy='batch_rebalance' orders"):
        sft_config(tmp_path, SelectionSFTConfig, train_sampling_strategy="batch_rebalance", **mixture)
    sft_config(tmp_path, SelectionSFTConfig, train_sampling_strategy="group_by_length", **mixture)
    sft_config(tmp_path, train_sampling_strategy="sequential")


@pytest.mark.parametrize("config", [EnsembleConfig, EnsembleSFTConfig])
def test_weights_are_read_from_flags(config, tmp_path):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--sampling_weights", '{"sums": 2}']
    flags += ["--task_sampling", "temperature", "--sampling_temperature", "3", "--task_loss_weighting", "tasks"]
    (args,) = HfArgumentParser(config).parse_args_into_dataclasses(flags)
    assert args.sampling_weights == {"sums": 2} and args.sampling_temperature == 3.0
    for value, message in (("{sums", "Expected sampling_weights as JSON"), ("[1]", "as a dict by name")):
        with pytest.raises(ConfigurationError, match=message):
            config(**{**SMALL, "output_dir": str(tmp_path), "bf16": False, "sampling_weights": value})


def test_every_argument_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    assert [own.name for own in fields(BalancingArguments) if f"`{own.name}" not in text] == []
