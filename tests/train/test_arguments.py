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
        ({"preconditioner": "optimizer"}, ConfigurationError, "a run captures before it trains"),
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


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            SelectionSFTConfig,
            {"selection_method": "mixture", "selection_metric": "accuracy"},
            "found selection_metric=",
        ),
        (SelectionSFTConfig, {"selection_method": "mixture", "max_examples": 5}, "found max_examples=5"),
        (EnsembleSFTConfig, {"num_groups": 3, "max_groups": 2}, "num_groups=3 is more than max_groups=2"),
        (EnsembleSFTConfig, {"num_groups": 2, "sequential_groups": True}, "sequential_groups=True chooses one mixture"),
        (EnsembleSFTConfig, {"compute_budget": 1.2, "max_steps": 30}, "Set continued_length to 0.2 or less"),
        (
            EnsembleSFTConfig,
            {"compute_budget": 1.5, "max_steps": 30, "group_initialization": "fresh"},
            "num_train_epochs instead of max_steps, or compute_budget to 2 or more",
        ),
    ],
)
def test_what_would_be_without_effect_or_impossible_is_refused_at_once(tmp_path, config, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        config(output_dir=str(tmp_path), bf16=False, **changes)


def test_shorter_trainings_of_few_steps_are_none(tmp_path):
    options = {"output_dir": str(tmp_path), "bf16": False, "compute_budget": 1.3}
    assert EnsembleSFTConfig(max_steps=14, **options).compute_budget == 1.3
    with pytest.raises(ConfigurationError, match="with max_steps=12 each of them takes 0.5: none would be trained"):
        EnsembleSFTConfig(max_steps=12, **options)


def test_budgets_of_steps_that_groups_fit_in_are_taken(tmp_path):
    for changes in (
        {"compute_budget": 1.25},
        {"compute_budget": 1.0},
        {"compute_budget": 1.2, "continued_length": 0.2},
    ):
        assert EnsembleSFTConfig(output_dir=str(tmp_path), bf16=False, max_steps=30, **changes).compute_budget


def test_a_search_of_too_many_subsets_is_refused_before_anything_is_captured(tmp_path, base_folder):
    tasks = {f"task_{k}": {"train": toy.sum_rows(6, k), "validation": toy.sum_rows(4, 50 + k)} for k in range(17)}

    def made(**changes):
        return SelectionSFTTrainer(
            model=base_folder,
            args=sft_config(tmp_path / "run", SelectionSFTConfig, selection_method="exhaustive", **changes),
            train_dataset=split(tasks, "train"),
            eval_dataset=split(tasks, "validation"),
            peft_config=toy.lora(),
            target="task_0",
        )

    with pytest.raises(ConfigurationError, match="16 optional tasks make 65536 subsets"):
        made()
    assert made(max_auxiliary=2).target == "task_0"


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
