"""Per-task metrics, model card and upload of plain trainings."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from helpers import toy
from helpers.markdown import code_blocks, tables
from hf_ensemble import AnswerMetric, ModelCardCallback, PushToHubCallback, TaskMetricsCallback, TaskSet
from hf_ensemble._cards import own_text, split_card
from hf_ensemble.errors import ConfigurationError, PushError, TaskError
from hf_ensemble.tasks import RowFormat, encode

SETTINGS = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 2, "save_strategy": "no"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return toy.save_model(toy.llama(num_hidden_layers=1), tmp_path_factory.mktemp("plain") / "base")


@pytest.fixture(scope="module")
def tasks():
    return TaskSet.from_datasets(toy.sft_tasks(8, 4))


def trainer(kind, base, folder, tasks, callbacks, **changes):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), toy.tokenizer()
    if kind == "sft":
        args = SFTConfig(output_dir=str(folder), bf16=False, **{**SETTINGS, **changes})
        tables = {"train_dataset": tasks.table("train"), "eval_dataset": tasks.table("validation")}
        lora = toy.lora()
        return SFTTrainer(model, args, processing_class=tokenizer, peft_config=lora, callbacks=callbacks, **tables)
    args = TrainingArguments(output_dir=str(folder), **{**SETTINGS, **changes})
    rows = [
        encode(tasks.table(split), tokenizer, RowFormat.PROMPT_COMPLETION).remove_columns(["task", "example_id"])
        for split in ("train", "validation")
    ]
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    return Trainer(model, args, collator, *rows, processing_class=tokenizer, callbacks=callbacks)


class Logged(TrainerCallback):
    """What trackers are given."""

    def __init__(self):
        self.names = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.names.extend(logs)


@pytest.mark.parametrize("kind", ["plain", "sft"])
def test_every_evaluation_has_the_metrics_of_each_task(tmp_path, base, tasks, kind):
    metrics = AnswerMetric("last_number", max_new_tokens=2)
    own, seen = TaskMetricsCallback(tasks, {"sums": metrics} if kind == "sft" else None), Logged()
    changes = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    host = trainer(kind, base, tmp_path, tasks, [own, seen], **changes)
    # A callback is told of no trainer: who passes theirs has trackers see the metrics.
    own.trainer = host if kind == "sft" else None
    host.train()
    assert seen.names.count("eval_diffs_loss") == (2 if kind == "sft" else 0)
    found = host.evaluate()
    for task in tasks:
        assert found[f"eval_{task}_loss"] == own.scores[task].loss > 0
        assert own.scores[task].num_examples == 4
    assert ("eval_sums_exact_match" in found) == (kind == "sft")
    assert found["eval_mean_loss"] == pytest.approx(sum(found[f"eval_{task}_loss"] for task in tasks) / 3)
    logged = [entry for entry in host.state.log_history if "eval_diffs_loss" in entry]
    assert len(logged) == 3 and logged[0]["eval_diffs_loss"] != logged[1]["eval_diffs_loss"]
    # The host's own loss of the same tokens: tasks weigh by their tokens there.
    assert min(found[f"eval_{task}_loss"] for task in tasks) < found["eval_loss"] + 0.2


def test_training_is_the_same_with_and_without_them(tmp_path, base, tasks):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1}

    def losses(callbacks):
        host = trainer("sft", base, tmp_path / str(len(callbacks)), tasks, callbacks, **changes)
        host.train()
        return [entry["loss"] for entry in host.state.log_history if "loss" in entry]

    assert losses([]) == losses([TaskMetricsCallback(tasks), ModelCardCallback(tasks)])


@pytest.mark.parametrize("kind", ["plain", "sft"])
def test_the_card_of_a_plain_training(tmp_path, base, tasks, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("out")
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# By hand\n")
    card = ModelCardCallback(tasks, {"language": "en", "license": "bsd", "tags": ["mine"]})
    host = trainer(kind, base, folder, tasks, [TaskMetricsCallback(tasks), card], eval_strategy="steps", eval_steps=2)
    host.train()
    written = ModelCard.load(folder / "README.md")
    assert written.data.license == "mit" and written.data.language == "en" and "mine" in written.data.tags
    assert written.data.library_name == ("peft" if kind == "sft" else "transformers")
    assert "# By hand" in written.text and str(tmp_path) not in str(written)
    figures = next(rows for rows in tables(written.text) if rows[0][:2] == ["dataset", "loss"])
    expected = next(entry for entry in host.state.log_history if "eval_sums_loss" in entry)["eval_sums_loss"]
    assert {row[0]: row[1] for row in figures[1:]}["sums"] == f"{expected:.4f}"
    # Its code runs once the model is saved there.
    host.model.save_pretrained(folder)
    host.processing_class.save_pretrained(folder)
    namespace: dict = {}
    for block in code_blocks(written.text, "python"):
        if "vllm" not in block:
            exec(block.replace("=64)", "=4)"), namespace)
    assert isinstance(namespace["model"], PeftModel) == (kind == "sft")
    assert len(namespace["answers"]) == len(namespace["texts"]) == 2


@pytest.mark.parametrize("by_hand", ["# By hand", None])
def test_drafts_that_trl_writes_are_no_cards_of_the_users(tmp_path, base, tasks, by_hand):
    card = tmp_path / "README.md"
    if by_hand:
        card.write_text(f"---\nlicense: mit\n---\n\n{by_hand}\n")
    texts = []

    class Reading(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            texts.append(card.read_text())

    trainer("sft", base, tmp_path, tasks, [ModelCardCallback(), Reading()], save_strategy="steps", save_steps=1).train()
    # A run that is killed leaves the text as well.
    assert len(texts) == 2 and all((by_hand or "# Model Card for") in text for text in texts)
    metadata, _ = split_card(card.read_text())
    assert own_text(card.read_text()) == (by_hand or "")
    assert "time machine" not in card.read_text() and "licence" not in metadata
    assert metadata.get("license") == ("mit" if by_hand else None)


def test_a_card_stays_as_it_is_byte_by_byte(tmp_path, base, tasks):
    card, texts = tmp_path / "README.md", []
    # Windows wrote it, and in no UTF-8: its generated part cannot be put into it.
    text = "# Von Hand\r\n\r\nK\xe4se\r\n".encode("latin-1")
    card.write_bytes(text)

    class Reading(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            texts.append(card.read_bytes())

    trainer("sft", base, tmp_path, tasks, [ModelCardCallback(), Reading()], save_strategy="steps", save_steps=2).train()
    assert texts == [text] and card.read_bytes() == text


def test_what_fails_stops_no_training(tmp_path, base, tasks, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise PushError("'user/x' was not updated: the Hub answered 503 in each of 4 tries.")

    monkeypatch.setattr("hf_ensemble.callbacks.publishing.push_adapter", refuse)
    monkeypatch.setattr("hf_ensemble.callbacks.publishing.training_card", lambda *args, **kwargs: 1 / 0)
    trainer("sft", base, tmp_path, tasks, [PushToHubCallback("user/x", tasks=tasks), ModelCardCallback()]).train()
    assert "complete, but was not uploaded: 'user/x' was not updated: the Hub answered 503" in caplog.text
    assert caplog.text.count("was not written: ZeroDivisionError") == 2


@pytest.mark.parametrize("kind", ["plain", "sft"])
def test_what_is_uploaded(tmp_path, base, tasks, kind, monkeypatch):
    uploaded = {}

    def push(repository, folder, replaced, card, again):
        uploaded["files"] = {path.name for path in folder.rglob("*") if path.is_file()}
        uploaded["card"], uploaded["repository"] = card(None), repository

    monkeypatch.setattr("hf_ensemble.callbacks.publishing.push_folder", push)
    monkeypatch.setattr("hf_ensemble.ensemble.saving.pushing.push_folder", push)
    (tmp_path / "README.md").write_text("# By hand\n")
    trainer(kind, base, tmp_path, tasks, [PushToHubCallback("user/x", private=True)], save_strategy="steps").train()
    files = (
        {"adapter_config.json", "adapter_model.safetensors"} if kind == "sft" else {"config.json", "model.safetensors"}
    )
    assert files | {"tokenizer.json"} <= uploaded["files"] and "README.md" not in uploaded["files"]
    assert uploaded["repository"].private and '"user/x"' in uploaded["card"]
    assert own_text(uploaded["card"]) == "# By hand"


@pytest.mark.parametrize("kind", ["plain", "sft"])
def test_without_a_card_no_path_of_this_machine_is_uploaded(tmp_path, base, tasks, kind, monkeypatch):
    uploaded = {}

    def push(repository, folder, replaced, card, again):
        uploaded["card"] = card(None)

    monkeypatch.setattr("hf_ensemble.callbacks.publishing.push_folder", push)
    monkeypatch.setattr("hf_ensemble.ensemble.saving.pushing.push_folder", push)
    monkeypatch.setattr("hf_ensemble.callbacks.publishing.training_card", lambda *args, **kwargs: 1 / 0)
    trainer(kind, base, tmp_path, tasks, [PushToHubCallback("user/x")]).train()
    metadata, _ = split_card(uploaded["card"])
    assert metadata["library_name"] == ("peft" if kind == "sft" else "transformers")
    assert "base_model" not in metadata and str(base) not in uploaded["card"]


def test_arguments_of_numpy_are_shown(tmp_path, base, tasks):
    changes = {"max_steps": np.int64(1), "learning_rate": np.float32(0.5)}
    trainer("plain", base, tmp_path, tasks, [ModelCardCallback()], **changes).train()
    text = (tmp_path / "README.md").read_text()
    assert '"max_steps": 1' in text and '"learning_rate": 0.5' in text


def test_the_code_of_a_classifiers_card_makes_its_outputs(tmp_path, monkeypatch):
    """Over an encoder whose checkpoint has no head."""
    toy.bert(num_labels=2).bert.save_pretrained(tmp_path / "encoder")
    tokenizer = toy.tokenizer()
    tokenizer.save_pretrained(tmp_path / "encoder")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=4)
    rows = [{**tokenizer(row["text"]), "labels": number % 4} for number, row in enumerate(toy.text_rows(8))]
    monkeypatch.chdir(tmp_path)
    args = TrainingArguments("out", **{**SETTINGS, "max_steps": 1})
    options = {"processing_class": tokenizer, "callbacks": [ModelCardCallback()]}
    host = Trainer(get_peft_model(base, toy.lora("SEQ_CLS")), args, train_dataset=Dataset.from_list(rows), **options)
    host.train()
    host.save_model("out")
    namespace: dict = {}
    exec(code_blocks(Path("out/README.md").read_text(), "python")[0], namespace)
    assert namespace["logits"].shape == (1, 4)


def test_arguments(tmp_path, base, tasks):
    with pytest.raises(ConfigurationError, match="Expected tasks to be a TaskSet, found a dict"):
        TaskMetricsCallback({})
    with pytest.raises(TaskError, match="'validation' rows of every task"):
        TaskMetricsCallback(TaskSet.from_datasets({"sums": toy.sum_rows(4)}))
    with pytest.raises(TaskError, match="'mean' is used for the means over the tasks"):
        TaskMetricsCallback(TaskSet.from_datasets({"mean": toy.sft_tasks(2, 2)["sums"]}))
    with pytest.raises(ConfigurationError, match="answer_metrics names unknown tasks"):
        TaskMetricsCallback(tasks, {"other": AnswerMetric()})
    with pytest.raises(ConfigurationError, match="Expected tasks to be a TaskSet, found a list"):
        ModelCardCallback([])
    with pytest.raises(ConfigurationError, match="Expected repo_id as a repository's name"):
        PushToHubCallback("https://host/x")
    model = get_peft_model(toy.llama(num_hidden_layers=1), toy.lora())
    args = TrainingArguments(output_dir=str(tmp_path), **SETTINGS)
    with pytest.raises(ConfigurationError, match="Expected a trainer with a tokenizer, found none"):
        Trainer(model, args, callbacks=[TaskMetricsCallback(tasks)])
