"""Rows that a transform or a collator of the user's reads: the parent's over one dataset, refused over several."""

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from helpers import toy
from helpers.trainers import ESTIMATE, PARTITION, SMALL, sft_config, split
from hf_ensemble import EnsembleConfig, EnsembleSFTTrainer, EnsembleTrainer, SelectionTrainer
from hf_ensemble.errors import ConfigurationError

FILMS = [{"text": row["text"], "label": row["label"]} for row in toy.text_rows(12)]
TOKENIZER = toy.tokenizer()


class Tokenizes:
    """A collator of texts, or a transform of a batch of them, that counts rows."""

    def __init__(self):
        self.num_rows = 0

    def __call__(self, rows):
        if isinstance(rows, list):
            rows = {column: [row[column] for row in rows] for column in ("text", "label")}
            found = dict(TOKENIZER(rows["text"], padding=True, return_tensors="pt"))
            found["labels"] = torch.tensor(rows["label"])
        else:
            found = {**TOKENIZER(rows["text"]), "labels": rows["label"]}
        self.num_rows += len(rows["text"])
        return found


def trained(trainer):
    loss = trainer.train().training_loss
    evaluated, predicted = trainer.evaluate(), trainer.predict(trainer.eval_dataset)
    return loss, evaluated["eval_loss"], predicted.predictions.tolist(), trainer.model.state_dict()


def assert_same(parent, ours):
    assert parent[:3] == ours[:3]
    assert all(torch.equal(value, ours[3][name]) for name, value in parent[3].items())


@pytest.mark.parametrize("trainer_class", [EnsembleTrainer, SelectionTrainer])
@pytest.mark.parametrize("in_a_dict", [False, True], ids=["plain", "in a dict"])
@pytest.mark.parametrize("read_by", ["collator", "collator and tokenizer", "transform", "transform and tokenizer"])
def test_over_one_dataset_they_are_the_parents(tmp_path, trainer_class, in_a_dict, read_by):
    found, counts = [], []
    for kind in (Trainer, trainer_class):
        reads, rows = Tokenizes(), Dataset.from_list(FILMS)
        collator = DataCollatorWithPadding(TOKENIZER) if "transform" in read_by else reads
        rows = rows.with_transform(reads) if "transform" in read_by else rows
        trainer = kind(
            model=toy.bert(2),
            args=TrainingArguments(str(tmp_path), **{**SMALL, "num_train_epochs": 3}, remove_unused_columns=False),
            data_collator=collator,
            train_dataset={"films": rows} if in_a_dict and kind is not Trainer else rows,
            eval_dataset=rows,
            processing_class=TOKENIZER if "tokenizer" in read_by else None,
        )
        found.append(trained(trainer))
        counts.append(reads.num_rows)
    assert_same(*found)
    # Three epochs, an evaluation and a prediction: what is random in them is drawn anew.
    assert counts[0] == counts[1] == 5 * len(FILMS)


@pytest.mark.parametrize("peft", [True, False])
def test_over_several_datasets_a_collator_of_texts_is_refused_in_the_constructor(tmp_path, peft):
    args = EnsembleConfig(str(tmp_path), **SMALL, **ESTIMATE, **PARTITION, remove_unused_columns=False)
    given = {"processing_class": TOKENIZER, "peft_config": toy.lora("SEQ_CLS") if peft else None}
    tasks, reads = split(toy.text_tasks(), "train"), Tokenizes()
    with pytest.raises(ConfigurationError, match="data_collator for rows of tokens.*Tokenizes made no batch.*'text'"):
        EnsembleTrainer(toy.bert(4), args, reads, tasks, **given)
    assert reads.num_rows == 0


def test_a_collator_of_tokens_is_tried_without_a_trace(tmp_path, base_folder):
    class Random(DataCollatorForLanguageModeling):
        calls = 0

        def torch_call(self, examples):
            self.calls += 1
            torch.rand(1)
            return super().torch_call(examples)

    random, states = Random(0), []
    for collator in (None, random):
        EnsembleSFTTrainer(
            base_folder,
            sft_config(tmp_path),
            collator,
            split(toy.sft_tasks(), "train"),
            split(toy.sft_tasks(), "validation"),
            peft_config=toy.lora(),
        )
        states.append(torch.get_rng_state())
    assert torch.equal(*states) and random.calls == 0


@pytest.mark.parametrize("peft", [True, False])
def test_over_several_datasets_a_transform_is_refused_in_the_constructor(tmp_path, base_folder, peft):
    rows = {name: Dataset.from_list(FILMS) for name in "ab"}
    rows["b"] = rows["b"].with_transform(Tokenizes())
    args = EnsembleConfig(str(tmp_path), **SMALL, **ESTIMATE, **PARTITION, remove_unused_columns=False)
    given = {"processing_class": TOKENIZER, "peft_config": toy.lora("SEQ_CLS") if peft else None}
    for named in (rows, {name: {"train": own, "validation": own} for name, own in rows.items()}):
        with pytest.raises(ConfigurationError, match=r"Tasks \['b'\].*once and not in every epoch. Apply it with Data"):
            EnsembleTrainer(toy.bert(4), args, train_dataset=named, **given)
    pairs = {name: Dataset.from_list(toy.sum_rows(6)).with_transform(dict) for name in "ab"}
    with pytest.raises(ConfigurationError, match=r"Tasks \['a', 'b'\].*or apply it with Dataset.map"):
        peft = toy.lora() if peft else None
        EnsembleSFTTrainer(base_folder, sft_config(tmp_path), train_dataset=pairs, peft_config=peft)


def test_supervised_fine_tuning_over_one_dataset(tmp_path, base_folder):
    """A transform is the parent's there, too."""
    reads, losses = [], []
    rows = Dataset.from_list([{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 8)

    def counted(batch):
        reads.extend(batch["input_ids"])
        return batch

    for kind in (SFTTrainer, EnsembleSFTTrainer):
        settings = {**SMALL, "bf16": False, "gradient_checkpointing": False}
        args = SFTConfig(str(tmp_path), dataset_kwargs={"skip_prepare_dataset": True}, **settings)
        trainer = kind(base_folder, args, train_dataset=rows.with_transform(counted))
        reads.clear()
        losses.append((trainer.train().training_loss, len(reads)))
    assert losses[0] == losses[1]
