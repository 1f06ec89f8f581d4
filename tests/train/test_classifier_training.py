"""Ensembles of text classifiers."""

import pytest
import torch
from safetensors.torch import load_file

from helpers import toy
from helpers.trainers import text_trainer
from hf_ensemble import (
    PeftEnsembleModel,
)


def test_classification_from_an_encoder_gets_a_head_that_reloads(tmp_path):
    """The checkpoint has no head: each adapter brings its own."""
    base = toy.save_model(toy.bert(2).bert, tmp_path / "base")
    trainer = text_trainer(tmp_path / "run", base, toy.text_tasks(), num_groups=2, affinity_subsets=10)
    metrics = trainer.train().metrics
    assert trainer.label_space.names == ("negative", "positive", "no", "yes")
    assert trainer.model.config.id2label[3] == "yes"
    loaded = PeftEnsembleModel.from_pretrained(tmp_path / "run" / "ensemble")
    rows = [trainer.eval_dataset[task][0] for task in trainer.tasks]
    batch = trainer.data_collator(rows)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels", "task")}
    with torch.no_grad():
        found, expected = loaded(**inputs), trainer.ensemble.eval()(**inputs)
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)
    assert torch.allclose(found.loss, expected.loss, atol=1e-5)
    assert 0 <= metrics["eval_films_accuracy"] <= 1


def test_loss_of_a_classifier_counts_the_own_labels_alone(tmp_path):
    trainer = text_trainer(tmp_path / "run", toy.bert(4), toy.text_tasks())
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (0, 13, 25)])
    ids = {key: value for key, value in batch.items() if key not in ("labels", "task", "example_id")}
    with torch.no_grad():
        trainer.model.eval()
        found = trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(batch)))
        logits = trainer.model(**ids).logits
    expected = 0
    for row, (task, label) in enumerate(zip(batch["task"], batch["labels"])):
        own = list(trainer.label_space.task_labels[task])
        expected = expected - torch.log_softmax(logits[row, own], -1)[own.index(int(label))]
    assert torch.allclose(found, expected / 3, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_gradient_accumulation_gives_the_same_classifier(tmp_path, batch_size):
    """Eight rows in one step, however they are cut."""
    tasks = {"t": {"train": toy.text_rows(8), "validation": toy.text_rows(2, 1)}}
    adapters = []
    for size in (8, batch_size):
        changes = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": 8 // size,
            "num_train_epochs": 1,
            "max_grad_norm": 0.0,
            "optim": "sgd",
        }
        trainer = text_trainer(tmp_path / f"run{size}", toy.bert(2), tasks, **changes)
        trainer.open_run()
        trainer.flow.training.run("one", ["t"], tmp_path / f"adapter{size}")
        adapters.append(load_file(str(tmp_path / f"adapter{size}" / "adapter_model.safetensors")))
    for name, value in adapters[0].items():
        assert torch.allclose(value, adapters[1][name], atol=1e-6), name
