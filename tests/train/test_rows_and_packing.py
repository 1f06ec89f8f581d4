"""Rows of several datasets: in every form that trl takes, held out, packed, and without an adapter."""

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from trl import SFTConfig, SFTTrainer

from helpers import toy
from helpers.sft_rows import chat_tokenizer, forms
from helpers.trainers import ESTIMATE, SMALL, sft_config, sft_trainer, split, text_trainer
from hf_ensemble import (
    EnsembleConfig,
    EnsembleSFTConfig,
    EnsembleSFTTrainer,
    EnsembleTrainer,
    SelectionSFTConfig,
    SelectionSFTTrainer,
)
from hf_ensemble.errors import ConfigurationError, TaskError

SFT = {**SMALL, "bf16": False, "gradient_checkpointing": False}


def test_every_form_of_rows_in_one_run(tmp_path, base_folder):
    """Each dataset's tokens and labels are those that trl makes of it alone."""
    datasets = {name: Dataset.from_list(rows) for name, rows in forms().items()}
    trainer = EnsembleSFTTrainer(
        base_folder,
        sft_config(tmp_path / "run"),
        train_dataset=datasets,
        eval_dataset=datasets,
        processing_class=chat_tokenizer(),
        peft_config=toy.lora(),
    )
    for name, rows in datasets.items():
        alone = SFTTrainer(
            base_folder,
            SFTConfig(str(tmp_path / "alone"), **SFT),
            train_dataset=rows,
            processing_class=chat_tokenizer(),
        )
        ours = trainer.train_dataset.filter(lambda row, name=name: row["task"] == name)
        for prepared in (ours, trainer.eval_dataset[name]):
            assert prepared["input_ids"][:] == alone.train_dataset["input_ids"][:], name
            assert prepared["labels"][:] == alone.train_dataset["labels"][:], name
    tests = trainer.prepare_rows({"chats": forms()["chats"][:2]})["chats"]
    assert tests["labels"][:] == trainer.eval_dataset["chats"]["labels"][:2]


def test_formatting_function_on_own_columns(tmp_path, base_folder):
    rows = {"a": toy.sum_rows(12, 1), "b": toy.sum_rows(12, 1, "diff")}
    own = {name: [{"q": row["prompt"], "a": row["completion"]} for row in table] for name, table in rows.items()}
    trainer = EnsembleSFTTrainer(
        base_folder,
        sft_config(tmp_path / "run"),
        train_dataset=own,
        eval_dataset=own,
        peft_config=toy.lora(),
        formatting_func=lambda row: row["q"] + row["a"],
    )
    expected = [toy.tokenizer()(row["prompt"] + row["completion"] + "<eos>")["input_ids"] for row in rows["b"]]
    assert trainer.eval_dataset["b"]["input_ids"][:] == expected


def test_rows_are_held_out_where_none_are_given(tmp_path, base_folder):
    tasks = toy.sft_tasks(train=50)
    trainer = EnsembleSFTTrainer(
        base_folder,
        sft_config(tmp_path / "run", num_groups=2),
        train_dataset=split(tasks, "train"),
        peft_config=toy.lora(),
    )
    assert {name: len(rows) for name, rows in trainer.eval_dataset.items()} == dict.fromkeys(tasks, 20)
    assert len(trainer.train_dataset) == 90
    trained, evaluated = set(trainer.train_dataset["example_id"]), set(trainer.eval_dataset["sums"]["example_id"])
    assert not trained & evaluated
    again = trainer.tasks.with_validation(0.5, 7)
    assert again.fingerprint == trainer.tasks.fingerprint


def test_packed_trainings_are_captured_and_scored_unpacked(tmp_path, base_folder):
    """Packing changes what a step trains on, and neither gradients nor scores of a given adapter."""
    runs = {}
    for packing in (False, True):
        runs[packing] = sft_trainer(tmp_path / f"{packing}", base_folder, packing=packing, max_length=32, num_groups=2)
    features = {packing: trainer.capture().table("train") for packing, trainer in runs.items()}
    assert np.array_equal(features[True].features, features[False].features)
    runs[True].train()
    baseline = runs[True].run_directory.trained_adapter("baseline")
    # 36 rows of at most 9 tokens: at least three go into a pack of 32.
    assert baseline.global_step <= 2 * 3
    assert all(0 < own.loss < 10 for own in runs[True].scores()["ensemble"].values())


@pytest.mark.parametrize(
    ("strategy", "max_length"), [("bfd", 24), ("wrapped", 24), ("bfd", 8), ("bfd_split", 8), ("wrapped", 8)]
)
def test_packed_rows_are_those_of_trl(tmp_path, base_folder, strategy, max_length):
    packed = {"packing": True, "packing_strategy": strategy, "max_length": max_length, "shuffle_dataset": True}
    trainer = sft_trainer(tmp_path / "run", base_folder, **packed)
    ours = trainer.adapter_trainer(trainer.args, trainer.train_dataset, trainer.eval_dataset, {}).train_dataset
    for task, rows in split(toy.sft_tasks(), "train").items():
        alone = SFTTrainer(
            base_folder, SFTConfig(str(tmp_path / "a"), **SFT, **packed), train_dataset=Dataset.from_list(rows)
        )
        own = ours.filter(lambda row, task=task: row["task"] == task)
        assert own["input_ids"][:] == alone.train_dataset["input_ids"][:]
    assert trainer.num_drawn_rows() == {task: ours["task"][:].count(task) for task in trainer.tasks}


PACKED = {"packing": True, "max_length": 20}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"eval_strategy": "epoch"},
        PACKED,
        {**PACKED, "packing_strategy": "wrapped", "shuffle_dataset": True},
        {"max_length": 8, "shuffle_dataset": True},
    ],
    ids=str,
)
def test_without_an_adapter_one_model_is_trained_on_all(tmp_path, base_folder, changes):
    """It equals trl's own training on the concatenated rows, and evaluates every dataset."""
    tasks = toy.sft_tasks()
    train = {name: Dataset.from_list(rows) for name, rows in split(tasks, "train").items()}
    evaluation = {name: Dataset.from_list(rows) for name, rows in split(tasks, "validation").items()}
    plain = SFTTrainer(
        base_folder,
        SFTConfig(str(tmp_path / "plain"), **SFT, **changes),
        train_dataset=concatenate_datasets(list(train.values())),
        eval_dataset=evaluation,
    )
    ours = EnsembleSFTTrainer(
        base_folder, SFTConfig(str(tmp_path / "ours"), **SFT, **changes), train_dataset=train, eval_dataset=evaluation
    )
    assert plain.train().training_loss == ours.train().training_loss
    weights = ours.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in plain.model.state_dict().items())
    assert plain.evaluate()["eval_diffs_loss"] == ours.evaluate()["eval_diffs_loss"]
    if not changes:
        assert EnsembleSFTTrainer(base_folder, ours.args, train_dataset=train).eval_dataset is None


def test_a_classifier_without_an_adapter(tmp_path):
    trainer = text_trainer(tmp_path, toy.bert(4), toy.text_tasks(), peft=None, num_train_epochs=8)
    before = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_films_loss"] < before["eval_films_loss"]
    tasks = split(toy.text_tasks(), "train")
    args = EnsembleConfig(str(tmp_path), **SMALL)
    ours = EnsembleTrainer(toy.bert(4), args, train_dataset=tasks, processing_class=toy.tokenizer())
    assert ours.eval_dataset is None and ours.train().global_step > 0


def test_learning_rates_that_were_not_given(tmp_path, base_folder):
    """2e-4 for adapters of several datasets, the parent's default elsewhere; what is given stays."""
    settings = {name: value for name, value in SFT.items() if name != "learning_rate"}
    tasks = split(toy.sft_tasks(), "train")

    def rate(config_class=EnsembleSFTConfig, train=tasks, peft=True, **changes):
        args = config_class(str(tmp_path), **settings, **changes)
        rows = {name: Dataset.from_list(own) for name, own in train.items()}
        return EnsembleSFTTrainer(
            base_folder, args, train_dataset=rows, peft_config=toy.lora() if peft else None
        ).args.learning_rate

    assert rate() == 2e-4 and rate(learning_rate=1e-3) == 1e-3
    assert rate(peft=False) == rate(train={"sums": tasks["sums"]}) == rate(SFTConfig) == 2e-5
    assert EnsembleConfig(str(tmp_path), **ESTIMATE).learning_rate is None
    trainer = text_trainer(tmp_path, toy.bert(4), toy.text_tasks(), peft=None, learning_rate=None)
    assert trainer.args.learning_rate == 5e-5


def test_bf16_is_off_without_an_accelerator(tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    assert EnsembleSFTConfig(str(tmp_path)).bf16 is False
    assert EnsembleSFTConfig(str(tmp_path), use_cpu=True).bf16 is True
    with pytest.raises(ValueError, match="bf16"):
        EnsembleSFTConfig(str(tmp_path), bf16=True)


def test_rows_that_are_not_prepared(tmp_path, base_folder):
    """Tokens without labels all count; a mask that nobody reads is refused."""
    skipped = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    tables = {name: Dataset.from_list(forms()["tokens"]) for name in "ab"}
    masked = {**tables, "b": Dataset.from_list(forms()["masked_tokens"])}
    for peft in (toy.lora(), None):
        trainer = EnsembleSFTTrainer(
            base_folder, sft_config(tmp_path, **skipped), train_dataset=tables, peft_config=peft
        )
        assert trainer.train_dataset["labels"][:] == trainer.train_dataset["input_ids"][:]
        with pytest.raises(TaskError, match="'b': expected labels.*leaves masks unread.*Add a 'labels' column"):
            EnsembleSFTTrainer(base_folder, sft_config(tmp_path, **skipped), train_dataset=masked, peft_config=peft)


def test_datasets_with_a_transform_are_refused_as_by_the_parent(tmp_path, base_folder):
    rows = {name: Dataset.from_list(forms()["texts"]).with_transform(dict) for name in "ab"}
    with pytest.raises(ConfigurationError, match=r"Dataset\.with_transform\(\).*skip_prepare_dataset.*trainer-ready"):
        EnsembleSFTTrainer(base_folder, sft_config(tmp_path), train_dataset=rows)


def test_a_selection_needs_an_adapter(tmp_path, base_folder):
    args = SelectionSFTConfig(str(tmp_path), **SFT)
    with pytest.raises(ConfigurationError, match="Pass peft_config"):
        SelectionSFTTrainer(base_folder, args, train_dataset=split(toy.sft_tasks(), "train"), target="sums")
