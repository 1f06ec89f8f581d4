"""Classifiers by name: which head they get, what is saved of it, and how they answer."""

import json
import shutil

import pytest
import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer, BertForSequenceClassification, pipeline

from helpers import toy
from helpers.task_files import write_tasks
from hf_ensemble import EnsembleConfig, EnsembleTrainer, LabelSimilarityForSequenceClassification, PeftEnsembleModel
from hf_ensemble.ensemble.saving.ensemble_config import CONFIG_NAME
from hf_ensemble.errors import ConfigurationError, EnsembleError
from hf_ensemble.models import LabelSimilarityConfig
from hf_ensemble.tasks import TaskSet
from hf_ensemble.train.inputs.classifiers import adapter_for_head, load_model, warn_of_random_head

TASKS = toy.text_tasks()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A saved encoder without a head, with its tokenizer."""
    return toy.save_model(toy.bert().bert, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, encoder):
    """A folder with a finished run, and its trainer."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_tasks(folder / "data", TASKS)

    def rows(split):
        return {name: load_dataset("json", data_files=f"{data}/{name}/{split}.jsonl", split="train") for name in TASKS}

    trainer = EnsembleTrainer(
        model=encoder,
        args=EnsembleConfig(
            output_dir=str(folder / "python"),
            use_cpu=True,
            save_strategy="no",
            num_train_epochs=1,
            projection_dim=64,
            num_components=10,
            num_groups=2,
            affinity_subsets=10,
        ),
        train_dataset=rows("train"),
        eval_dataset=rows("validation"),
        peft_config=LoraConfig(r=2, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear"),
    )
    trainer.train()
    return folder, trainer


@pytest.fixture(scope="module")
def moved(runs, tmp_path_factory):
    """The saved ensemble alone, in another place."""
    folder = tmp_path_factory.mktemp("moved") / "ensemble"
    shutil.copytree(runs[0] / "python" / "ensemble", folder)
    return folder


@torch.no_grad()
def test_saved_ensemble_is_rebuilt_from_the_encoder_alone(runs, moved, encoder):
    _, trainer = runs
    assert type(trainer.adapter_model.get_base_model()) is LabelSimilarityForSequenceClassification
    saved = json.loads((moved / CONFIG_NAME).read_text())["base_model"]
    assert saved["name_or_path"] == encoder and saved["label_head"]["texts"] == ["negative", "positive", "no", "yes"]
    loaded = PeftEnsembleModel.from_pretrained(moved)
    batch = AutoTokenizer.from_pretrained(moved)(
        ["the film was good", "a poor song"], padding=True, return_tensors="pt"
    )
    trainer.model.eval()
    tasks = ["films", "songs"]
    assert torch.equal(loaded(**batch, task=tasks).logits, trainer.model(**batch, task=tasks).logits)
    # And from another place, as after an upload.
    elsewhere = PeftEnsembleModel.from_pretrained(moved, base_model=encoder)
    assert torch.equal(elsewhere(**batch, task=tasks).logits, loaded(**batch, task=tasks).logits)


def test_label_head_of_a_file_is_checked(moved, tmp_path):
    folder = shutil.copytree(moved, tmp_path / "copy")
    data = json.loads((folder / CONFIG_NAME).read_text())
    head = data["base_model"]["label_head"]
    assert head["dtype"] == "float32"
    for key, value, message in (
        ("token_ids", [["a"]] * 4, "expected the tokens of each of 4 label texts"),
        ("dtype", "load", "expected a type of torch in label_head, found 'load'"),
    ):
        data["base_model"]["label_head"] = {**head, key: value}
        (folder / CONFIG_NAME).write_text(json.dumps(data))
        with pytest.raises(EnsembleError, match=message):
            PeftEnsembleModel.from_pretrained(folder)


@torch.no_grad()
def test_pipeline_answers_with_the_labels_of_the_task(moved, caplog):
    ensemble, tokenizer = PeftEnsembleModel.from_pretrained(moved), AutoTokenizer.from_pretrained(moved)
    texts = ["the song was good", "the song was very awful"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    for task, labels in {"songs": ["no", "yes"], "films": ["negative", "positive"]}.items():
        pipe = pipeline("text-classification", model=ensemble.for_task(task), tokenizer=tokenizer, top_k=None)
        answers = pipe(texts, batch_size=2)
        own = ensemble(**batch, task=task).logits[:, [ensemble.label_space.names.index(label) for label in labels]]
        for answer, expected in zip(answers, own.softmax(-1)):
            found = {row["label"]: row["score"] for row in answer}
            assert [found[label] for label in labels] == pytest.approx(expected.tolist(), abs=1e-6)
    assert "not supported" not in caplog.text
    targets = torch.tensor([1, 0])
    output = ensemble.for_task("songs")(**batch, labels=targets)
    own = ensemble(**batch, labels=targets + 2, task="songs")
    assert output.logits.shape == (2, 2) and float(output.loss) == pytest.approx(float(own.loss), abs=1e-6)


def test_pipelines_and_calls_without_a_known_task_are_refused(moved):
    ensemble, tokenizer = PeftEnsembleModel.from_pretrained(moved), AutoTokenizer.from_pretrained(moved)
    pipe = pipeline("text-classification", model=ensemble, tokenizer=tokenizer)
    with pytest.raises(EnsembleError, match=r"found none.*pass model=ensemble.for_task"):
        pipe("the song was good")
    batch = tokenizer("the song was good", return_tensors="pt")
    for task in ("poems", ["poems"]):
        with pytest.raises(EnsembleError, match=r"one of \['books', 'films', 'songs'\]; found \['poems'\]"):
            ensemble(**batch, task=task)
    with pytest.raises(EnsembleError, match="found \\['poems'\\]"):
        ensemble.for_task("poems")
    assert torch.equal(
        ensemble(**batch, task="poems", routing="default").logits, ensemble(**batch, routing="default").logits
    )


@pytest.mark.parametrize(
    ("head", "labels", "named", "kind"),
    [
        (None, 4, True, LabelSimilarityForSequenceClassification),
        (None, 4, False, BertForSequenceClassification),
        (4, 4, True, BertForSequenceClassification),
        (3, 4, True, LabelSimilarityForSequenceClassification),
    ],
)
def test_auto_keeps_a_trained_head_for_as_many_labels(head, labels, named, kind, encoder, tmp_path, caplog):
    folder = encoder if head is None else toy.save_model(toy.bert(head), tmp_path / "classifier")
    rows = {name: own["train"] for name, own in TASKS.items()}
    if not named:
        rows = {name: [{"text": row["text"], "label": row["label"]} for row in own] for name, own in rows.items()}
    model = load_model(folder, TaskSet.from_datasets(rows), toy.tokenizer(), "auto", {})
    assert type(model) is kind
    assert ("numbers without names" in caplog.text) == ("is new and random" in caplog.text) == (not named)


def test_labels_that_are_the_same_tokens_are_compared_with_no_text(encoder, caplog):
    rows = [{"text": row["text"], "label": ["qzx", "zqx"][row["label"]]} for row in TASKS["films"]["train"]]
    tasks = TaskSet.from_datasets({"films": rows, "others": rows})
    assert type(load_model(encoder, tasks, toy.tokenizer(), "auto", {})) is BertForSequenceClassification
    assert "Labels of every task are the same tokens" in caplog.text
    with pytest.raises(ConfigurationError, match="same tokens to this tokenizer, 'films' among them.* head='linear'"):
        load_model(encoder, tasks, toy.tokenizer(), "label_similarity", {})
    some = TaskSet.from_datasets({"films": rows, "songs": TASKS["songs"]["train"]})
    assert type(load_model(encoder, some, toy.tokenizer(), "auto", {})) is LabelSimilarityForSequenceClassification
    assert "Labels of ['films'] are the same tokens" in caplog.text


def test_random_heads_are_warned_of(encoder, caplog):
    warn_of_random_head(toy.bert(2))
    assert not caplog.text
    model = BertForSequenceClassification.from_pretrained(encoder, num_labels=2)
    warn_of_random_head(model)
    assert "head of this BertForSequenceClassification is new and random" in caplog.text
    config = LoraConfig(target_modules=["query"])
    assert adapter_for_head(config, model).task_type == "SEQ_CLS" and config.task_type is None
    with pytest.raises(ConfigurationError, match="task_type='SEQ_CLS'.*found 'CAUSAL_LM'"):
        adapter_for_head(toy.lora(target_modules=["query"]), model)


def test_configuration_of_the_encoder_alone(encoder, caplog):
    """PEFT reads it where an adapter is saved."""
    config = LabelSimilarityConfig.from_pretrained(encoder)
    assert config.vocab_size == len(toy.VOCABULARY) and config.encoder_config.model_type == "bert"
    assert "You are using a model of type" not in caplog.text


def test_unknown_heads_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="head has to be one of .* found 'big'"):
        EnsembleConfig(output_dir=str(tmp_path), use_cpu=True, head="big")


def test_a_member_loads_alone_on_the_encoder(moved, encoder):
    ensemble = PeftEnsembleModel.from_pretrained(moved)
    base = LabelSimilarityForSequenceClassification.from_encoder(
        encoder, AutoTokenizer.from_pretrained(moved), ensemble.label_space.names
    )
    name = ensemble.adapter_names[0]
    alone = PeftModel.from_pretrained(base, moved / "adapters" / name)
    assert alone.active_adapter == "default"
