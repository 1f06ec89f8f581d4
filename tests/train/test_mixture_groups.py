"""Runs whose groups are mixtures, or go on from the adapter for all tasks."""

import json

import pytest
import torch
from datasets import concatenate_datasets
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from helpers import toy
from helpers.trainers import SMALL, sft_config, sft_trainer
from hf_ensemble import PeftEnsembleModel, TaskSet
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.runs import EnsembleWeights, Estimate
from hf_ensemble.select import predicted_losses


def test_adapters_are_trained_on_their_mixtures_within_the_budget(tmp_path, base_folder):
    options = {"grouping_method": "mixtures", "compute_budget": 2.0, "train_baseline": False}
    trainer = sft_trainer(tmp_path / "run", base_folder, **options)
    trainer.train()
    grouping, run = trainer.grouping, trainer.run_directory
    assert grouping.cost <= 2.0 and grouping.method == "mixtures" and grouping.baseline_group is None
    for name in grouping.groups:
        assert run.trained_adapter(name).mixture == grouping.mixtures[name]
    drawn = sum(run.trained_adapter(name).global_step for name in grouping.groups)
    whole = 2 * -(-sum(len(task.splits["train"]) for task in trainer.tasks.values()) // 4)
    # Steps are rounded up once an epoch.
    assert drawn <= grouping.cost * whole + 2 * len(grouping.groups)
    estimate = json.loads((run.path / "estimate" / "estimate.json").read_text())
    assert set(estimate["predicted_loss"]) == set(grouping.groups)
    loaded = PeftEnsembleModel.from_pretrained(run.ensemble)
    assert set(loaded.weights) == set(trainer.tasks)


@pytest.mark.parametrize("max_steps", [-1, 6])
def test_a_group_that_goes_on_is_a_plain_training_from_the_baselines_adapter(tmp_path, base_folder, max_steps):
    trainer = sft_trainer(
        tmp_path / "run",
        base_folder,
        num_groups=2,
        group_initialization="baseline",
        continued_length=0.5,
        max_steps=max_steps,
    )
    trainer.train()
    run, tasks = trainer.run_directory, TaskSet.from_datasets(toy.sft_tasks())
    recorded = run.read(Estimate).predicted_loss
    predicted = predicted_losses(trainer.selector().estimator, trainer.grouping)
    assert {name: list(own.values()) for name, own in recorded.items()} == {
        name: pytest.approx(own) for name, own in zip(trainer.grouping.groups, predicted.tolist())
    }
    for name, members in trainer.grouping.groups.items():
        trained = run.trained_adapter(name)
        assert trained.length == 0.5 and trained.theta0 != run.trained_adapter("baseline").theta0
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        args = {**SMALL, "num_train_epochs": 1, "max_steps": 3 if max_steps > 0 else -1}
        plain = SFTTrainer(
            model=PeftModel.from_pretrained(base, str(run.baseline), is_trainable=True),
            args=SFTConfig(output_dir=str(tmp_path / name), bf16=False, gradient_checkpointing=False, **args),
            train_dataset=concatenate_datasets([tasks.split("train")[member] for member in members]),
            processing_class=toy.tokenizer(),
        )
        plain.train()
        assert trained.global_step == plain.state.global_step
        expected = {n: p for n, p in plain.model.named_parameters() if "lora_" in n}
        ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), str(run.member(name)))
        found = dict(ours.named_parameters())
        assert all(torch.allclose(found[n], p, atol=1e-6) for n, p in expected.items())


def test_one_group_that_goes_on_is_weighed_against_the_baseline(tmp_path, base_folder):
    options = {"num_groups": 1, "group_initialization": "baseline", "num_train_epochs": 1}
    trainer = sft_trainer(tmp_path / "run", base_folder, **options)
    metrics = trainer.train().metrics
    weights = trainer.run_directory.read(EnsembleWeights)
    assert set(weights.losses) == set(trainer.tasks)
    for task in trainer.tasks:
        assert metrics[f"eval_{task}_loss"] <= metrics[f"eval_baseline_{task}_loss"] + 1e-3


def test_there_has_to_be_an_adapter_to_go_on_from(tmp_path):
    with pytest.raises(ConfigurationError, match="train_baseline=False does not train"):
        sft_config(tmp_path, group_initialization="baseline", train_baseline=False)
