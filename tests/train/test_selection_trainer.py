"""Trainers that choose auxiliary tasks for a target."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers import toy
from helpers.trainers import sft_config, split, text_trainer
from hf_ensemble import (
    Selection,
    SelectionConfig,
    SelectionSFTConfig,
    SelectionSFTTrainer,
    SelectionTrainer,
)
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.runs import Evaluation
from hf_ensemble.select import methods


@pytest.mark.parametrize("meta", [False, True])
def test_selection_trains_once_on_what_it_chose(tmp_path, base_folder, meta):
    tasks = toy.sft_tasks()
    arguments = {
        "model": base_folder,
        "args": sft_config(tmp_path / "run", SelectionSFTConfig, meta_initialization=meta, max_auxiliary=1),
        "train_dataset": split(tasks, "train"),
        "eval_dataset": split(tasks, "validation"),
        "peft_config": toy.lora(),
        "target": "sums",
    }
    trainer = SelectionSFTTrainer(**arguments)
    metrics = trainer.train().metrics
    assert trainer.selection.tasks[0] == "sums" and len(trainer.selection.tasks) <= 2
    record = json.loads((tmp_path / "run" / "training" / "adapter.json").read_text())
    assert list(record["mixture"]) == trainer.selection.tasks
    assert metrics["eval_loss"] == metrics["eval_sums_loss"]
    trainer.evaluate({"sums": toy.sum_rows(4, 9)}, metric_key_prefix="test")
    assert set(trainer.run_directory.read(Evaluation).scores) == {"eval", "test"}
    assert (tmp_path / "run" / "meta" / "adapter_model.safetensors").exists() == meta
    # The model in hand is the fine-tuned one.
    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "run" / "adapter")
    ids = torch.randint(3, 20, (2, 5))
    with torch.no_grad():
        assert torch.allclose(trainer.model.eval()(input_ids=ids).logits, saved.eval()(input_ids=ids).logits, atol=1e-6)
    again = SelectionSFTTrainer(**arguments).train().metrics
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"])


def test_a_mixture_is_trained_with_its_weights(tmp_path, base_folder, monkeypatch):
    tasks = toy.sft_tasks()
    found = methods.optimize_mixture

    def with_a_half(estimator, target, caps, **options):
        mixture = found(estimator, target, caps, **options)
        (target,) = target
        other = next(name for name in tasks if name != target)
        return replace(mixture, weights={target: 1.0, other: 0.5}, probabilities={target: 0.7, other: 0.3})

    monkeypatch.setattr(methods, "optimize_mixture", with_a_half)
    trainer = SelectionSFTTrainer(
        model=base_folder,
        args=sft_config(tmp_path / "run", SelectionSFTConfig, selection_method="mixture", calibration_runs=0),
        train_dataset=split(tasks, "train"),
        eval_dataset=split(tasks, "validation"),
        peft_config=toy.lora(),
        target="sums",
    )
    trainer.train()
    record = json.loads((tmp_path / "run" / "training" / "adapter.json").read_text())
    assert record["mixture"] == pytest.approx(trainer.selection.weights)
    assert trainer.selection.method == "mixture" and sorted(record["mixture"].values()) == [0.5, 1.0]
    again = Selection.load(tmp_path / "run" / "selection.json")
    assert again == trainer.selection and again.weights == record["mixture"]


def test_selection_of_classification_tasks(tmp_path):
    trainer = text_trainer(
        tmp_path / "run",
        toy.bert(4),
        toy.text_tasks(),
        SelectionTrainer,
        SelectionConfig,
        target="films",
        selection_method="random_ensemble",
    )
    assert "eval_accuracy" in trainer.train().metrics
    with pytest.raises(ConfigurationError, match="Unknown target 'x'"):
        text_trainer(tmp_path / "r", toy.bert(4), toy.text_tasks(), SelectionTrainer, SelectionConfig, target="x")
