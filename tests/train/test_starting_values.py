"""Scripts that draw an adapter or a head without a seed, started again."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers import toy
from helpers.trainers import killed_in_a_call, sft_config, split, text_trainer
from hf_ensemble import EnsembleSFTTrainer
from hf_ensemble.errors import RunMismatchError
from hf_ensemble.train.task_trainer import TaskSFTTrainer

_REMEDY = "transformers.set_seed before they are made, or give the trainer the model's name and peft_config"


def trainer_of(folder, base, change=None, config=None, **changes):
    """A trainer of a script that makes its adapter without a seed."""
    torch.seed()
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config or toy.lora())
    if change is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                change(name, parameter)
    tasks = toy.sft_tasks()
    return EnsembleSFTTrainer(
        model=model,
        args=sft_config(folder, num_groups=2, num_train_epochs=1, **changes),
        train_dataset=split(tasks, "train"),
        eval_dataset=split(tasks, "validation"),
        processing_class=toy.tokenizer(),
    )


def start_of(trainer):
    trainer.open_run()
    return trainer.flow.training.theta0


def test_a_killed_run_goes_on_with_the_values_that_it_began_with(tmp_path, base_folder, monkeypatch, caplog):
    whole = trainer_of(tmp_path / "whole", base_folder)
    begun = start_of(whole)
    whole.train()
    calls = killed_in_a_call(monkeypatch, TaskSFTTrainer, "train", 3)
    first = trainer_of(tmp_path / "run", base_folder)
    with torch.no_grad():
        for name, parameter in first.model.named_parameters():
            if name in begun:
                parameter.copy_(begun[name])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert "starting values" not in caplog.text
    trainer_of(tmp_path / "run", base_folder).train()
    assert "random starting values of the adapter are others" in caplog.text and len(calls) == 4
    for name in ("baseline", "ensemble/adapters/group_0", "ensemble/adapters/group_1"):
        found, expected = (
            load_file(tmp_path / folder / name / "adapter_model.safetensors") for folder in ("run", "whole")
        )
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_an_adapter_that_is_not_new_has_to_be_the_same(tmp_path, base_folder):
    def trained(name, parameter):
        if "lora_B" in name:
            parameter.fill_(0.01)

    start_of(trainer_of(tmp_path / "new", base_folder))
    with pytest.raises(RunMismatchError, match=rf"model.theta0: found.*{_REMEDY}"):
        trainer_of(tmp_path / "new", base_folder, trained).open_run()
    start_of(trainer_of(tmp_path / "trained", base_folder, trained))
    for change in (trained, None):
        with pytest.raises(RunMismatchError, match=rf"model.theta0: found.*{_REMEDY}"):
            trainer_of(tmp_path / "trained", base_folder, change).open_run()


@pytest.mark.parametrize("other", ["base", "rank", "argument"])
def test_what_differs_in_more_than_its_random_values_is_another_run(tmp_path, base_folder, other):
    def change_base(name, parameter):
        if "down_proj" in name and "lora" not in name:
            parameter.add_(0.5)

    begun = start_of(trainer_of(tmp_path, base_folder))
    given = {
        "base": {"change": change_base},
        "rank": {"config": LoraConfig(r=3, lora_alpha=8, target_modules=["q_proj"])},
        "argument": {"weight_decay": 0.1},
    }[other]
    name = {"base": "model.base_weights", "rank": "model.adapter", "argument": "weight_decay"}[other]
    with pytest.raises(RunMismatchError, match=name):
        trainer_of(tmp_path, base_folder, **given).open_run()
    again = start_of(trainer_of(tmp_path, base_folder, overwrite_run=True, **given))
    assert not all(key in again and torch.equal(value, again[key]) for key, value in begun.items())
    kept = load_file(tmp_path / "theta0.safetensors")
    assert kept.keys() == again.keys() and all(torch.equal(value, again[key]) for key, value in kept.items())


def test_another_choice_is_redone_from_the_values_that_the_run_began_with(tmp_path, base_folder):
    begun = start_of(trainer_of(tmp_path, base_folder))
    again = start_of(trainer_of(tmp_path, base_folder, overwrite_run=True, affinity_subsets=21, projection_seed=3))
    assert all(torch.equal(value, again[key]) for key, value in begun.items())


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"x")])
def test_without_the_values_that_it_began_with_a_run_is_refused(tmp_path, base_folder, damage):
    start_of(trainer_of(tmp_path, base_folder))
    damage(tmp_path / "theta0.safetensors")
    with pytest.raises(RunMismatchError, match=r"model.theta0"):
        trainer_of(tmp_path, base_folder).open_run()


def test_a_head_that_was_drawn_anew_is_named_with_what_to_do(tmp_path):
    def trainer():
        model = toy.bert(4)
        torch.seed()
        model.classifier.reset_parameters()
        return text_trainer(tmp_path, model, toy.text_tasks())

    trainer().open_run()
    with pytest.raises(RunMismatchError, match=rf"model.base_weights: found.*{_REMEDY}"):
        trainer().open_run()
