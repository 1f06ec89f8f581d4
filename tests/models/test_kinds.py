"""Which models are scored: those whose labels are the ones that scores and gradients are taken of."""

import pytest
import torch
import transformers
from datasets import Dataset
from peft import get_peft_model
from transformers import DataCollatorForTokenClassification, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from helpers import toy
from helpers.trainers import ESTIMATE, PARTITION, SMALL, split
from hf_ensemble import (
    EnsembleConfig,
    EnsembleTrainer,
    GradientCaptureCallback,
    SelectionConfig,
    SelectionSFTConfig,
    SelectionSFTTrainer,
    SelectionTrainer,
    TaskMetricsCallback,
    TaskSet,
    capture_gradients,
)
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.models.answer_scorer import AnswerScorer
from hf_ensemble.models.kinds import ModelKind, kind_of, shifts_labels

OTHERS = ("BertForTokenClassification", "BertForMaskedLM", "BertForPreTraining")
REFUSED = "Expected a causal language model, an encoder-decoder or a sequence classifier.*found a? ?{}"


class Tagger(transformers.BertForTokenClassification):
    """A class of the user's own."""


def tagger(name="BertForTokenClassification"):
    model = Tagger(toy.bert(3).config) if name == "Tagger" else toy.other_head(name)
    return get_peft_model(model, toy.lora(None))


@pytest.mark.parametrize("name", [*OTHERS, "Tagger"])
def test_scores_and_gradients_of_other_labels_are_refused(name, tmp_path):
    model, tasks = tagger(name), TaskSet.from_datasets(toy.tagged_tasks())
    with pytest.raises(ConfigurationError, match=REFUSED.format(name)):
        AnswerScorer(model)
    with pytest.raises(ConfigurationError, match=REFUSED.format(name)):
        capture_gradients(model, tasks, output_dir=tmp_path / "store", processing_class=toy.tokenizer())
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["ensemble", "selection", "selection sft", "selection sft by name"])
def test_runs_refuse_other_labels_in_the_constructor(name, tmp_path):
    model, rows = toy.other_head("BertForMaskedLM"), toy.tagged_tasks()
    classes = {"ensemble": (EnsembleTrainer, EnsembleConfig), "selection": (SelectionTrainer, SelectionConfig)}
    trainer_class, config_class = classes.get(name, (SelectionSFTTrainer, SelectionSFTConfig))
    own = {"bf16": False, "gradient_checkpointing": False} if "sft" in name else {}
    with pytest.raises(ConfigurationError, match=REFUSED.format("BertForMaskedLM")):
        trainer_class(
            model=toy.save_model(model, tmp_path / "base") if "by name" in name else model,
            args=config_class(**{**SMALL, **ESTIMATE, **own, "output_dir": str(tmp_path / "run")}),
            train_dataset=split(rows, "train"),
            eval_dataset=split(rows, "validation"),
            processing_class=toy.tokenizer(),
            peft_config=toy.lora(None),
            **({} if name == "ensemble" else {"target": "films"}),
        )


def callbacks(folder):
    tasks = TaskSet.from_datasets(toy.tagged_tasks())
    return {"capture": GradientCaptureCallback(tasks, folder / "store"), "metrics": TaskMetricsCallback(tasks)}


@pytest.mark.parametrize("is_added_later", [False, True])
@pytest.mark.parametrize("kind", ["trainer", "sft"])
@pytest.mark.parametrize("name", ["capture", "metrics"])
def test_callbacks_refuse_other_labels_before_anything_is_trained(name, kind, is_added_later, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "training_step", lambda *args, **kwargs: pytest.fail("something was trained"))
    callback, tokenizer = callbacks(tmp_path)[name], toy.tokenizer()
    trainer_class, config_class = (Trainer, TrainingArguments) if kind == "trainer" else (SFTTrainer, SFTConfig)
    own = {} if kind == "trainer" else {"bf16": False, "gradient_checkpointing": False}
    with pytest.raises(ConfigurationError, match=REFUSED.format("BertForTokenClassification")):
        trainer = trainer_class(
            model=tagger(),
            args=config_class(**{**SMALL, **own, "output_dir": str(tmp_path)}),
            train_dataset=Dataset.from_list(toy.tagged_tasks()["films"]["train"]),
            data_collator=DataCollatorForTokenClassification(tokenizer),
            processing_class=tokenizer,
            callbacks=None if is_added_later else [callback],
        )
        trainer.add_callback(callback)
        trainer.train()


def test_one_token_classifier_is_trained_as_its_parent_trains_it(tmp_path):
    """Without an adapter the loss is the parent's, and so are the losses by task."""
    rows = toy.tagged_tasks()
    settings = {**SMALL, **PARTITION, **ESTIMATE, "logging_strategy": "steps", "logging_steps": 1, "max_steps": 1}
    settings |= {"per_device_train_batch_size": 36, "output_dir": str(tmp_path)}
    trainer = EnsembleTrainer(
        model=toy.other_head("BertForTokenClassification"),
        args=EnsembleConfig(**settings),
        train_dataset=split(rows, "train"),
        processing_class=toy.tokenizer(),
    )
    expected = {}
    for name, own in split(rows, "train").items():
        losses = [trainer.model(**{key: torch.tensor([row[key]]) for key in row}).loss.item() for row in own]
        lengths = [len(row["labels"]) for row in own]
        expected[name] = sum(loss * length for loss, length in zip(losses, lengths)) / sum(lengths)
    trainer.train()
    found = trainer.state.log_history[0]
    assert {name: found[f"loss_{name}"] for name in rows} == pytest.approx(expected, rel=1e-5)


def test_rows_without_a_class_are_refused_for_a_classifier(tmp_path):
    tasks = TaskSet.from_datasets({"a": {name: [{"text": "the film was good"}] for name in ("train", "validation")}})
    model = get_peft_model(toy.bert(2), toy.lora("SEQ_CLS"))
    with pytest.raises(ConfigurationError, match="rows with one class each for a BertForSequenceClassification"):
        capture_gradients(model, tasks, output_dir=tmp_path, processing_class=toy.tokenizer())


def test_rows_with_a_class_are_refused_for_a_language_model(tmp_path):
    tasks = TaskSet.from_datasets(toy.text_tasks())
    with pytest.raises(ConfigurationError, match="Expected a sequence classifier for rows with one class each.*Llama"):
        capture_gradients(toy.with_lora(toy.llama()), tasks, output_dir=tmp_path, processing_class=toy.tokenizer())


@pytest.mark.parametrize(
    ("name", "kind", "shifts"),
    [
        ("LlamaForCausalLM", ModelKind.LANGUAGE_MODEL, True),
        ("GPT2LMHeadModel", ModelKind.LANGUAGE_MODEL, True),
        ("T5ForConditionalGeneration", ModelKind.LANGUAGE_MODEL, False),
        ("BertForSequenceClassification", ModelKind.CLASSIFIER, False),
        ("BertForTokenClassification", ModelKind.OTHER, False),
        ("T5ForTokenClassification", ModelKind.OTHER, False),
        ("XLNetLMHeadModel", ModelKind.OTHER, False),
        ("XLMWithLMHeadModel", ModelKind.OTHER, False),
        ("BertModel", None, False),
    ],
)
def test_kinds_are_told_by_the_class(name, kind, shifts):
    model_class = getattr(transformers, name)
    with torch.device("meta"):
        model = model_class(model_class.config_class())
    assert (kind_of(model), shifts_labels(model)) == (kind, shifts)


@pytest.mark.parametrize("weighting", ["tokens", "tasks"])
def test_gpt2_is_trained_on_the_next_token(weighting, tmp_path):
    """transformers names no loss for it, so that `Trainer` takes its labels for unshifted."""
    torch.manual_seed(0)
    settings = {"vocab_size": len(toy.VOCABULARY), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings, bos_token_id=2, eos_token_id=2)).eval()
    rows = split(toy.sft_tasks(), "train")
    own = {**SMALL, **PARTITION, **ESTIMATE, "logging_strategy": "steps", "logging_steps": 1, "max_steps": 1}
    own |= {"per_device_train_batch_size": 36, "learning_rate": 1e-12, "output_dir": str(tmp_path)}
    config = EnsembleConfig(**own, task_loss_weighting=weighting)
    trainer = EnsembleTrainer(model=model, args=config, train_dataset=rows, processing_class=toy.tokenizer())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = {}
    for name in rows:
        tokens = [row for row in trainer.train_dataset if row["task"] == name]
        with torch.no_grad():
            expected[name] = -torch.cat([AnswerScorer(model)(*one_row(row)).log_probs for row in tokens]).mean().item()
    trainer.train()
    logs = trainer.state.log_history[0]
    assert {name: logs[f"loss_{name}"] for name in rows} == pytest.approx(expected, rel=1e-4)
    if weighting == "tasks":
        assert logs["loss"] == pytest.approx(sum(expected.values()) / len(expected), rel=1e-4)


def one_row(row):
    inputs = {"input_ids": torch.tensor([row["input_ids"]]), "attention_mask": torch.tensor([row["attention_mask"]])}
    return inputs, torch.tensor([row["labels"]])


@pytest.mark.parametrize("kind", [TaskMetricsCallback, GradientCaptureCallback])
def test_heads_of_other_labels_are_refused_before_a_training(kind, tmp_path):
    """Labels 0 and 1 of two tasks that are not named are four labels: nothing says that they are the same."""
    rows = [{"text": f"film {number}", "label": number % 2} for number in range(8)]
    given = {"film": rows, "book": rows}
    tasks, tokens = TaskSet.from_datasets(given, given), [{"input_ids": [3, 4], "labels": 1}] * 4
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")

    def trainer(model, tasks):
        callback = kind(tasks, *([tmp_path / "store"] if kind is GradientCaptureCallback else []))
        return Trainer(model, args, train_dataset=tokens, processing_class=toy.tokenizer(), callbacks=[callback])

    model = get_peft_model(toy.bert(2), toy.lora("SEQ_CLS"))
    with pytest.raises(ConfigurationError, match="4 different labels, .* 2 outputs.*name them alike in .* label_text"):
        trainer(model, tasks)
    named = [{**row, "label_text": ("good", "bad")[row["label"]]} for row in rows]
    alike = TaskSet.from_datasets({"film": named, "book": named}, {"film": named, "book": named})
    trainer(model, alike)
    model.config.id2label = dict(enumerate(reversed(alike.label_space.names)))
    with pytest.raises(ConfigurationError, match="in another order"):
        trainer(model, alike)
