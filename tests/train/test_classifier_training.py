"""Ensembles of text classifiers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertForSequenceClassification,
    DataCollatorWithPadding,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
)

from helpers import toy
from helpers.trainers import text_trainer
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.errors import ConfigurationError


def test_classification_from_an_encoder_gets_a_head_that_reloads(tmp_path):
    """The checkpoint has no head: each adapter brings its own."""
    base = toy.save_model(toy.bert(2).bert, tmp_path / "base")
    trainer = text_trainer(tmp_path / "run", base, toy.text_tasks(), num_groups=2, affinity_subsets=10, head="linear")
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


def classifiers():
    """Over an encoder and a decoder."""
    llama = toy.llama(num_labels=2).config
    torch.manual_seed(0)
    return {"bert": toy.bert(2), "llama": LlamaForSequenceClassification(llama).eval()}


def step(folder, kind, batch_size, plain=False):
    """Gradients of one step over eleven rows in batches of `batch_size`, and its loss."""
    tasks = {
        name: {"train": toy.text_rows(count), "validation": toy.text_rows(2)} for name, count in (("t", 6), ("u", 5))
    }
    changes = {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": -(-11 // batch_size),
        "num_train_epochs": 1,
        "max_grad_norm": 0.0,
        "optim": "sgd",
    }
    lora = LoraConfig(r=4, target_modules=["query" if kind == "bert" else "q_proj"], task_type="SEQ_CLS")
    model = get_peft_model(classifiers()[kind], lora)
    outer = text_trainer(folder, model, tasks, peft=None, **changes)
    if plain:
        rows = outer.train_dataset.remove_columns(["task", "example_id"])
        inner = Trainer(outer.model, outer.args, DataCollatorWithPadding(outer.processing_class), rows)
    else:
        inner = outer.adapter_trainer(outer.args, outer.train_dataset, {}, {})
    gradients = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})

    inner.add_callback(Look())
    return gradients, inner.train().training_loss


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_gradients_of_a_step_do_not_depend_on_how_it_is_cut(tmp_path, kind):
    """Eleven rows in one batch, and in batches whose last one is smaller."""
    whole, loss = step(tmp_path / "whole", kind, 11)
    assert any(gradient.abs().max() > 1e-3 for gradient in whole.values())
    for size in (1, 2, 4):
        parts, parts_loss = step(tmp_path / str(size), kind, size)
        assert parts_loss == pytest.approx(loss, rel=1e-5)
        for name, expected in whole.items():
            assert torch.allclose(parts[name], expected, atol=1e-6), name


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_plain_trainer_sums_over_the_accumulated_batches(tmp_path, kind):
    """The one difference that is on purpose; it goes where transformers mends it."""
    own, own_loss = step(tmp_path / "own", kind, 11)
    plain, plain_loss = step(tmp_path / "plain", kind, 11, plain=True)
    assert own_loss == plain_loss and all(torch.equal(own[name], plain[name]) for name in plain)
    parts, parts_loss = step(tmp_path / "parts", kind, 1, plain=True)
    assert parts_loss == pytest.approx(11 * own_loss, rel=1e-5)
    for name, expected in own.items():
        assert torch.allclose(parts[name], 11 * expected, atol=1e-5), name


def test_gradients_are_the_plain_trainers_where_it_averages(tmp_path, monkeypatch):
    """For models that say that they know nothing of the step, it divides by the number of batches."""
    monkeypatch.setattr(BertForSequenceClassification, "accepts_loss_kwargs", False, raising=False)
    for size in (1, 4):
        own, own_loss = step(tmp_path / f"own{size}", "bert", size)
        plain, plain_loss = step(tmp_path / f"plain{size}", "bert", size, plain=True)
        assert own_loss == plain_loss and all(torch.equal(own[name], plain[name]) for name in plain)


def same_labels():
    """Two tasks of one label set."""
    return {
        name: {"train": toy.text_rows(count, 1, name), "validation": toy.text_rows(4, 2, name)}
        for name, count in (("film", 6), ("book", 5))
    }


def test_smoothed_labels_are_a_plain_trainers(tmp_path):
    changes = {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2, "eval_strategy": "epoch"}
    model = get_peft_model(toy.bert(2), toy.lora("SEQ_CLS"))
    outer = text_trainer(tmp_path / "run", model, same_labels(), peft=None, **changes)
    start = {name: own.detach().clone() for name, own in model.named_parameters() if own.requires_grad}

    def trained(trainer):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in start:
                    parameter.copy_(start[name])
        loss = trainer.train().training_loss
        evaluated = [entry["eval_film_loss"] for entry in trainer.state.log_history if "eval_film_loss" in entry]
        return loss, evaluated, {name: own.detach().clone() for name, own in model.named_parameters() if name in start}

    found = trained(outer.adapter_trainer(outer.args, outer.train_dataset, outer.eval_dataset, {}))
    columns = ["task", "example_id"]
    rows = outer.train_dataset.remove_columns(columns)
    tables = {task: own.remove_columns(columns) for task, own in outer.eval_dataset.items()}
    expected = trained(Trainer(model, outer.args, DataCollatorWithPadding(outer.processing_class), rows, tables))
    assert found[:2] == expected[:2] and len(found[1]) == 2
    assert all(torch.equal(found[2][name], own) for name, own in expected[2].items())
    unsmoothed = text_trainer(
        tmp_path / "plain", model, same_labels(), peft=None, **{**changes, "label_smoothing_factor": 0.0}
    )
    assert trained(unsmoothed.adapter_trainer(unsmoothed.args, outer.train_dataset, {}, {}))[0] != expected[0]


def test_label_smoothing_is_refused_where_label_sets_differ(tmp_path):
    text_trainer(tmp_path / "run", toy.bert(2), same_labels(), label_smoothing_factor=0.1)
    with pytest.raises(ConfigurationError, match="label_smoothing_factor is for tasks of one label set.*'songs'"):
        text_trainer(tmp_path / "other", toy.bert(4), toy.text_tasks(), label_smoothing_factor=0.1)
