"""What users give a trainer beside rows and arguments: callbacks, keywords, schedules, functions without a source."""

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback

from helpers import toy
from helpers.architectures import MODELS
from helpers.trainers import ESTIMATE, PARTITION, SMALL, sft_config, split, text_trainer
from hf_ensemble import EnsembleConfig, EnsembleSFTTrainer, EnsembleTrainer
from hf_ensemble.errors import ConfigurationError


@dataclass
class Counting(TrainerCallback):
    """Dataclasses are equal by their values, and have no hash."""

    steps: int = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


def test_callbacks_without_a_hash_are_called(tmp_path):
    callback = Counting()
    trainer = text_trainer(tmp_path / "run", toy.bert(4), toy.text_tasks(), callbacks=[callback], num_groups=1)
    trainer.train()
    assert callback.steps == sum(own.global_step for own in trainer.run_directory.trainings()) > 0


@pytest.mark.parametrize("name", ["sampling_weights", "label_space", "has_tasks"])
@pytest.mark.parametrize("kind", ["sft", "text"])
def test_keywords_of_the_parts_are_refused(tmp_path, kind, name):
    with pytest.raises(ConfigurationError, match=f"{name} is no argument of the trainer"):
        trainer_of(kind, tmp_path, **{name: None})


@pytest.mark.parametrize("is_one", [False, True])
def test_an_adapter_on_an_adapter_is_refused(tmp_path, is_one):
    model = get_peft_model(toy.bert(4), toy.lora("SEQ_CLS"))
    rows = toy.text_rows(8)
    args = EnsembleConfig(output_dir=str(tmp_path), **SMALL)
    given = {"model": model, "args": args, "peft_config": toy.lora("SEQ_CLS"), "processing_class": toy.tokenizer()}
    given |= {"train_dataset": [{"input_ids": [3, 4], "labels": 1}] * 4 if is_one else {"a": rows, "b": rows}}
    with pytest.raises(ConfigurationError, match="found both: .*Leave peft_config out"):
        EnsembleTrainer(**given)


def trainer_of(kind, folder, **keywords):
    tasks = toy.sft_tasks() if kind == "sft" else toy.text_tasks()
    given = {"train_dataset": split(tasks, "train"), "processing_class": toy.tokenizer()}
    if kind == "sft":
        return EnsembleSFTTrainer(
            model=toy.llama(), args=sft_config(folder), peft_config=toy.lora(), **given, **keywords
        )
    args = EnsembleConfig(output_dir=str(folder), **SMALL)
    return EnsembleTrainer(model=toy.bert(4), args=args, peft_config=toy.lora("SEQ_CLS"), **given, **keywords)


class Schedules(TrainerCallback):
    """The options of each training's schedule, and its highest learning rate."""

    def __init__(self):
        self.options, self.rates = [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.options.append(args.lr_scheduler_kwargs)
        self.rates.append([])

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        self.rates[-1].append(lr_scheduler.get_last_lr()[0])


def test_schedules_of_shorter_trainings_are_as_much_shorter(tmp_path):
    options, seen = {"num_decay_steps": 8, "min_lr_ratio": 0.1}, Schedules()
    trainer = text_trainer(
        tmp_path / "run",
        toy.bert(4),
        toy.text_tasks(),
        callbacks=[seen],
        **{"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": options, "warmup_steps": 2},
        **{"grouping_method": "direct", "group_initialization": "baseline", "continued_length": 0.5, "num_groups": 1},
    )
    trainer.train()
    assert seen.options == [options, {**options, "num_decay_steps": 4}] and trainer.args.lr_scheduler_kwargs == options
    # Each reaches the learning rate that was asked for.
    assert [max(rates) for rates in seen.rates] == [trainer.args.learning_rate] * 2


CODE = """
import json, sys
sys.path.insert(0, {path!r})
from hf_ensemble._values import identity_of
import torch
def outer(x):
    def inner(y):
        return torch.{function}(y)
    return [inner(x) for _ in {{"a", "b"}} if x in ("p", "q")] + [lambda: inner]
print(json.dumps(identity_of(outer), default=str))
"""


def test_functions_without_a_source_have_the_same_identity_in_every_process():
    def printed(function, seed):
        code = CODE.format(path=str(sys.path[0]), function=function)
        own = subprocess.run(
            [sys.executable, "-"], input=code, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        return own.stdout.strip().splitlines()[-1]

    first = printed("sin", "1")
    assert "source" in first and printed("sin", "2") == first != printed("cos", "1")


def test_metrics_of_an_encoder_decoder_get_one_structure_of_every_system(tmp_path):
    t5, config = MODELS["t5"]
    config = type(config)(**{**config.to_dict(), "vocab_size": len(toy.VOCABULARY)})
    seen = []

    def made():
        torch.manual_seed(0)
        return t5(config)

    def metrics(prediction):
        own = prediction.predictions
        seen.append(type(own))
        tokens = own[0] if isinstance(own, tuple) else own
        return {"tokens": float((tokens.argmax(-1) == prediction.label_ids).mean())}

    def trainer_in(folder):
        settings = {**SMALL, **ESTIMATE, **PARTITION, "num_groups": 2, "affinity_subsets": 20, "num_train_epochs": 1}
        tasks = toy.sft_tasks()
        return EnsembleTrainer(
            model=made(),
            args=EnsembleConfig(output_dir=str(folder), **{**settings, "eval_strategy": "epoch"}),
            train_dataset=split(tasks, "train"),
            eval_dataset=split(tasks, "validation"),
            processing_class=toy.tokenizer(),
            peft_config=toy.lora("SEQ_2_SEQ_LM", target_modules=["q", "v"]),
            compute_metrics=metrics,
        )

    found = trainer_in(tmp_path / "whole").train().metrics
    assert set(seen) == {tuple}
    name = list(toy.sft_tasks())[0]
    assert {f"eval_{name}_tokens", f"eval_baseline_{name}_tokens"} <= set(found)
    seen.clear()
    ignored = ["past_key_values", "encoder_last_hidden_state"]
    other = trainer_in(tmp_path / "logits").train(ignore_keys_for_eval=ignored).metrics
    assert set(seen) == {np.ndarray} and other[f"eval_{name}_tokens"] == found[f"eval_{name}_tokens"]
