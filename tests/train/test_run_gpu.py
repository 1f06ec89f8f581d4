"""Whole runs on a GPU: devices, precision, and agreement with the CPU."""

import pytest
import torch

from helpers import toy
from helpers.trainers import sft_config, split, text_trainer
from hf_ensemble import EnsembleSFTTrainer, PeftEnsembleModel, SelectionConfig, SelectionTrainer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("bf16", [False, True])
def test_an_ensemble_run_on_a_gpu(tmp_path, base_folder, bf16):
    tasks = toy.sft_tasks()
    trainer = EnsembleSFTTrainer(
        model=base_folder,
        args=sft_config(tmp_path / "run", num_groups=2, use_cpu=False, bf16=bf16),
        train_dataset=split(tasks, "train"),
        eval_dataset=split(tasks, "validation"),
        peft_config=toy.lora(),
    )
    metrics = trainer.train().metrics
    assert trainer.model.device.type == "cuda"
    loaded = PeftEnsembleModel.from_pretrained(tmp_path / "run" / "ensemble")
    here = PeftEnsembleModel.from_pretrained(tmp_path / "run" / "ensemble").cuda()
    row = trainer.flow.context.eval_tables["sums"][0]
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    for combination in ("logits", "log_probs", "probs"):
        loaded.combination = here.combination = combination
        expected = loaded.score(labels, "sums", input_ids=ids).loss
        assert torch.allclose(here.score(labels.cuda(), "sums", input_ids=ids.cuda()).loss.cpu(), expected, atol=1e-4)
        generated = here.generate(ids[:, :4].cuda(), task="sums", max_new_tokens=4, do_sample=False)
        assert torch.equal(generated.cpu(), loaded.generate(ids[:, :4], task="sums", max_new_tokens=4, do_sample=False))
    assert metrics["eval_sums_loss"] > 0


def test_a_selection_of_classification_tasks_on_a_gpu(tmp_path):
    trainer = text_trainer(
        tmp_path / "run",
        toy.bert(4),
        toy.text_tasks(),
        SelectionTrainer,
        SelectionConfig,
        target="films",
        use_cpu=False,
    )
    assert "eval_accuracy" in trainer.train().metrics and trainer.model.device.type == "cuda"


def test_probabilities_of_classifiers_stay_on_the_device(tmp_path):
    trainer = text_trainer(tmp_path / "run", toy.bert(4), toy.text_tasks(), num_groups=2, use_cpu=False)
    trainer.train()
    trainer.ensemble.combination = "probs"
    rows = [trainer.eval_dataset[task][0] for task in trainer.tasks]
    batch = trainer.data_collator(rows)
    inputs = {key: batch[key].cuda() for key in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        output = trainer.ensemble.eval()(**inputs, task=batch["task"])
    assert output.logits.device.type == "cuda" and output.loss > 0
