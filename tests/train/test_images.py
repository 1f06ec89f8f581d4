"""Rows with images: trained by one model over several datasets, as trl trains it, and refused for adapters."""

import pytest
import torch
from datasets import concatenate_datasets
from trl import SFTConfig, SFTTrainer

from helpers import toy
from helpers.trainers import SMALL, sft_config
from helpers.vision import llava, picture_rows
from hf_ensemble import EnsembleSFTTrainer
from hf_ensemble.errors import TaskError

SFT = {**SMALL, "bf16": False, "gradient_checkpointing": False, "max_length": None, "num_train_epochs": 1}


def rows():
    return {"films": picture_rows(6), "books": picture_rows(6, "book")}


def test_one_model_on_all_datasets_is_the_parent_on_the_concatenated_rows(tmp_path):
    traces = []
    for trainer_class, train in (
        (SFTTrainer, concatenate_datasets(list(rows().values()))),
        (EnsembleSFTTrainer, rows()),
    ):
        model, processor = llava()
        args = SFTConfig(str(tmp_path / trainer_class.__name__), **SFT)
        trainer = trainer_class(model, args, train_dataset=train, eval_dataset=rows(), processing_class=processor)
        traces.append((trainer.train().training_loss, trainer.evaluate()["eval_books_loss"], model.state_dict()))
    assert traces[0][:2] == traces[1][:2]
    assert all(torch.equal(value, traces[1][2][name]) for name, value in traces[0][2].items())


def test_streams(tmp_path):
    model, processor = llava()
    train = {name: own.to_iterable_dataset() for name, own in rows().items()}
    args = SFTConfig(str(tmp_path), **SFT, max_steps=2)
    trainer = EnsembleSFTTrainer(model, args, train_dataset=train, processing_class=processor)
    assert trainer.train().global_step == 2


def test_rows_are_known_by_their_pictures(tmp_path):
    model, processor = llava()
    args = SFTConfig(str(tmp_path), **SFT)
    tasks = EnsembleSFTTrainer(model, args, train_dataset=rows(), processing_class=processor).tasks
    ids = tasks["films"].splits["train"]["example_id"]
    assert len(set(ids)) == 6 and not any("-" in own for own in ids)


def test_what_cannot_be_trained_is_refused_in_the_constructor(tmp_path, base_folder):
    text = {"films": picture_rows(4).remove_columns("images"), "books": rows()["books"]}
    for train, peft, message in [
        (rows(), toy.lora(), "'films', split 'train': rows with images .*without an adapter"),
        (text, None, r"same columns in all datasets, found \['messages'\] in 'films'.*an empty list"),
    ]:
        model, processor = llava()
        with pytest.raises(TaskError, match=message):
            EnsembleSFTTrainer(
                model, sft_config(tmp_path), train_dataset=train, processing_class=processor, peft_config=peft
            )
    with pytest.raises(ValueError, match="vision-related.*vision-language model"):
        EnsembleSFTTrainer(base_folder, sft_config(tmp_path), train_dataset=rows())
