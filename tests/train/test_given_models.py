"""Models as `Trainer` takes them: made by a function of a trial, without a tokenizer, and modules of one's own."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import DataCollatorWithPadding

from helpers import toy
from helpers.trainers import ESTIMATE, PARTITION, SMALL, split
from hf_ensemble import (
    AnswerMetric,
    EnsembleConfig,
    EnsembleTrainer,
    PeftEnsembleModel,
    SelectionConfig,
    SelectionTrainer,
)
from hf_ensemble.errors import ConfigurationError

TEXTS = split(toy.text_tasks(), "train")
TOKENS = {
    name: Dataset.from_list([{**toy.tokenizer()(row["text"]), "label": row["label"]} for row in rows])
    for name, rows in TEXTS.items()
}


class Plain(torch.nn.Module):
    """A classifier that knows no configuration."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(len(toy.VOCABULARY), 8), torch.nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.embedding(input_ids).mean(dim=1))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def trainer(folder, rows, kind="ensemble", peft=True, **given):
    trainer_class, config_class = {
        "ensemble": (EnsembleTrainer, EnsembleConfig),
        "selection": (SelectionTrainer, SelectionConfig),
    }[kind]
    own = {**SMALL, **ESTIMATE, **(PARTITION if kind == "ensemble" else {"max_auxiliary": 1})}
    given = {"peft_config": toy.lora("SEQ_CLS") if peft else None, **given}
    given |= {"target": "films"} if kind == "selection" else {}
    return trainer_class(args=config_class(**own, output_dir=str(folder)), train_dataset=rows, **given)


@pytest.mark.parametrize("peft", [True, False])
def test_a_function_that_makes_the_model_may_take_a_trial(tmp_path, peft):
    trials = []

    def make(trial):
        trials.append(trial)
        return toy.bert(4)

    trainer(tmp_path, TEXTS, peft=peft, model_init=make, processing_class=toy.tokenizer())
    assert trials == [None]
    with pytest.raises(ConfigurationError, match="no argument or the trial .*found 2 arguments"):
        trainer(tmp_path, TEXTS, model_init=lambda a, b: toy.bert(4), processing_class=toy.tokenizer())
    with pytest.raises(ConfigurationError, match="Expected model to be a model, .*found a NoneType"):
        trainer(tmp_path, TEXTS, model_init=lambda: None, processing_class=toy.tokenizer())


@pytest.mark.parametrize("kind", ["ensemble", "selection"])
def test_tokens_and_a_collator_need_no_tokenizer(tmp_path, kind):
    collator = DataCollatorWithPadding(toy.tokenizer())
    own = trainer(tmp_path / "own", TOKENS, kind, model=toy.bert(2), data_collator=collator)
    assert own.processing_class is None
    given = {"model": toy.bert(2), "data_collator": collator, "processing_class": toy.tokenizer()}
    other = trainer(tmp_path / "other", TOKENS, kind, **given)
    assert own.train().training_loss == pytest.approx(other.train().training_loss, rel=1e-6)
    own.save_model(str(tmp_path / "saved"))
    assert not list((tmp_path / "saved").glob("tokenizer*")) and list((tmp_path / "saved").rglob("adapter_model*"))
    if kind == "ensemble":
        PeftEnsembleModel.from_pretrained(tmp_path / "saved", base_model=toy.bert(2))


def test_tokens_and_a_collator_need_no_tokenizer_without_an_adapter(tmp_path):
    collator = DataCollatorWithPadding(toy.tokenizer())
    own = trainer(tmp_path, TOKENS, peft=False, model=toy.bert(2), data_collator=collator)
    assert own.train().global_step == 18 and own.predict(TOKENS).metrics["test_films_loss"] > 0


def test_what_needs_a_tokenizer_says_so(tmp_path):
    for rows, given in ((TOKENS, {}), (TEXTS, {"data_collator": DataCollatorWithPadding(toy.tokenizer())})):
        for peft in (True, False):
            with pytest.raises(ConfigurationError, match="Expected a tokenizer, .*Pass processing_class"):
                trainer(tmp_path, rows, peft=peft, model=toy.bert(4), **given)
    pairs = {name: [{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}] * 4 for name in "ab"}
    given = {"model": toy.llama(), "peft_config": toy.lora(), "data_collator": DataCollatorWithPadding(toy.tokenizer())}
    with pytest.raises(ConfigurationError, match="answer_metrics reads generated answers as text.*no tokenizer"):
        trainer(tmp_path, pairs, answer_metrics=AnswerMetric(), **given)


def test_a_folder_without_a_tokenizer_is_enough_for_tokens(tmp_path):
    toy.bert(2).save_pretrained(tmp_path / "base")
    given = {"data_collator": DataCollatorWithPadding(toy.tokenizer()), "peft_config": toy.lora("CAUSAL_LM")}
    toy.llama().save_pretrained(tmp_path / "base")
    pairs = {name: [{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}] * 4 for name in "ab"}
    assert trainer(tmp_path / "run", pairs, model=str(tmp_path / "base"), **given).processing_class is None


@pytest.mark.parametrize("kind", ["ensemble", "selection"])
def test_an_adapter_needs_a_model_with_a_configuration(tmp_path, kind):
    rows = {name: own.select_columns(["input_ids", "label"]) for name, own in TOKENS.items()}
    given = {"model": Plain(), "processing_class": toy.tokenizer(), "peft_config": LoraConfig(target_modules=["head"])}
    with pytest.raises(ConfigurationError, match="Expected a transformers model, .*found a Plain without one"):
        trainer(tmp_path, rows, kind, **given)


@pytest.mark.parametrize("rows", [TOKENS, {name: TEXTS[name] for name in ("films", "books")}], ids=["tokens", "texts"])
def test_without_an_adapter_a_module_of_ones_own_is_trained(tmp_path, rows):
    own = trainer(tmp_path, rows, peft=False, model=Plain(), processing_class=toy.tokenizer())
    assert own.train().training_loss < 1
