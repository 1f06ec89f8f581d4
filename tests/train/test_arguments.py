"""Arguments of the trainers."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from helpers import toy
from helpers.trainers import sft_config, sft_trainer, split, text_trainer
from hf_ensemble import (
    EnsembleConfig,
    EnsembleSFTConfig,
    EnsembleSFTTrainer,
    EnsembleTrainer,
    SelectionConfig,
    SelectionSFTConfig,
    SelectionSFTTrainer,
    SelectionTrainer,
)
from hf_ensemble.errors import ConfigurationError, TaskError


def test_bad_arguments_are_named(tmp_path, base_folder):
    tasks = toy.sft_tasks()
    for changes, error, message in [
        ({"num_components": 0}, ConfigurationError, "num_components"),
        ({"grouping_method": "x"}, ConfigurationError, "grouping_method"),
        ({"ensemble_weights": "x"}, ConfigurationError, "ensemble_weights"),
        ({"margin": "x"}, ConfigurationError, "margin"),
        ({"max_length": 2}, TaskError, "is left after tokenization"),
        ({"capture_batch_size": 0}, ConfigurationError, "batch_size has to be a positive integer"),
        ({"preconditioner": "lion"}, ConfigurationError, "preconditioner has to be one of"),
        ({"num_groups": 0}, ConfigurationError, "num_groups has to be a positive integer"),
        ({"num_groups": 4}, ConfigurationError, "num_groups=4 is more than the 3 tasks"),
    ]:
        with pytest.raises(error, match=message):
            sft_trainer(tmp_path / "run", base_folder, tasks, **changes)
    arguments = {"model": base_folder, "args": sft_config(tmp_path / "run"), "peft_config": toy.lora()}
    splits = DatasetDict({split: Dataset.from_list(rows) for split, rows in tasks["sums"].items()})
    with pytest.raises(TaskError, match=r"found the splits \['train', 'validation'\] of one dataset"):
        EnsembleSFTTrainer(**arguments, train_dataset=splits)
    with pytest.raises(TaskError, match="Expected evaluation rows by name.*found one Dataset"):
        EnsembleSFTTrainer(**arguments, train_dataset=split(tasks, "train"), eval_dataset=splits["validation"])
    with pytest.raises(ValueError, match="not conversational"):
        sft_trainer(tmp_path / "run", base_folder, tasks, assistant_only_loss=True)
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ConfigurationError, match="optimizer_cls_and_kwargs"):
        EnsembleSFTTrainer(**arguments, train_dataset=tasks, optimizers=(optimizer, None))
    with pytest.raises(ConfigurationError, match="4 different labels, the model's head has 3"):
        text_trainer(tmp_path / "run", toy.bert(3), toy.text_tasks())
    trainer = sft_trainer(tmp_path / "run", base_folder)
    with pytest.raises(ConfigurationError, match="call train"):
        trainer.push_to_hub()


@pytest.mark.parametrize("config", [EnsembleConfig, EnsembleSFTConfig, SelectionConfig, SelectionSFTConfig])
def test_configs_are_parsed_from_flags_and_explain_themselves(config, tmp_path):
    flags = ["--output_dir", str(tmp_path), "--projection_dim", "64", "--use_cpu", "--bf16", "false"]
    (parsed,) = HfArgumentParser(config).parse_args_into_dataclasses(flags)
    assert parsed.projection_dim == 64
    base = SFTConfig if issubclass(config, SFTConfig) else TrainingArguments
    own = set(config.__dataclass_fields__) - set(base.__dataclass_fields__)
    assert own and all(config.__dataclass_fields__[name].metadata["help"] for name in own)
    assert issubclass(config, TrainingArguments)


def test_trainers_are_trainers():
    assert issubclass(EnsembleSFTTrainer, SFTTrainer) and issubclass(SelectionSFTTrainer, SFTTrainer)
    assert issubclass(EnsembleTrainer, Trainer) and issubclass(SelectionTrainer, Trainer)


def test_a_device_that_is_not_there_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigurationError, match="estimate_device has to be a device of this machine.*found 'abacus'"):
        sft_config(tmp_path, estimate_device="abacus")
    assert sft_config(tmp_path, estimate_device="cpu").estimate_device == "cpu"
