"""What a fine-tuner of LoRA expects without saying so: layers to adapt, and a word where nothing was learnt."""

import logging
import re

import pytest
import torch
from peft import IA3Config, LoraConfig
from transformers import DistilBertConfig, DistilBertForSequenceClassification, Olmo2Config, Olmo2ForCausalLM

from helpers import toy
from helpers.architectures import MODELS
from helpers.trainers import sft_config, sft_trainer, split, text_trainer
from hf_ensemble import EnsembleConfig, EnsembleSFTTrainer, EnsembleTrainer
from hf_ensemble.errors import ConfigurationError

LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def olmo():
    torch.manual_seed(0)
    return Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=len(toy.VOCABULARY),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=2,
        )
    )


def trainer(folder, model, peft_config, **options):
    return EnsembleSFTTrainer(
        model, sft_config(folder), train_dataset=toy.sft_tasks(), peft_config=peft_config, **options
    )


def adapted(model):
    return {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name}


@pytest.mark.parametrize("by_name", [True, False], ids=["name", "model"])
def test_layers_are_inferred_where_peft_has_no_default(tmp_path, caplog, by_name):
    config = LoraConfig(r=4, task_type="CAUSAL_LM")
    model, options = olmo(), {"processing_class": toy.tokenizer()}
    if by_name:
        model, options = toy.save_model(model, tmp_path / "base"), {}
    assert adapted(trainer(tmp_path / "run", model, config, **options).model) == set(LINEAR)
    assert config.target_modules is None
    (said,) = [r.getMessage() for r in caplog.records if "has no default target_modules" in r.getMessage()]
    assert "'olmo2'" in said and str(LINEAR) in said


def test_layers_of_a_classifier_are_inferred_but_for_its_head(tmp_path):
    config = DistilBertConfig(
        vocab_size=len(toy.VOCABULARY), dim=32, hidden_dim=48, n_layers=1, n_heads=4, num_labels=4, pad_token_id=0
    )
    made = EnsembleTrainer(
        DistilBertForSequenceClassification(config),
        text_trainer(tmp_path, toy.bert(4), toy.text_tasks()).args,
        train_dataset=toy.text_tasks(),
        processing_class=toy.tokenizer(),
        peft_config=LoraConfig(r=4, task_type="SEQ_CLS"),
    )
    assert adapted(made.model) == {"q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"}


def test_a_language_model_s_adapter_says_what_it_is_of(tmp_path, base_folder):
    given = LoraConfig(r=2, target_modules=["q_proj"])
    found = trainer(tmp_path, base_folder, given).adapter_model.peft_config["default"]
    # What is saved without one is not told what model to load.
    assert found.task_type == "CAUSAL_LM" and given.task_type is None
    t5, config = MODELS["t5"]
    made = EnsembleTrainer(
        t5(type(config)(**{**config.to_dict(), "vocab_size": len(toy.VOCABULARY)})),
        EnsembleConfig(output_dir=str(tmp_path / "t5"), use_cpu=True, report_to="none"),
        train_dataset=toy.sft_tasks(),
        processing_class=toy.tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q"]),
    )
    assert made.adapter_model.peft_config["default"].task_type == "SEQ_2_SEQ_LM"


def test_defaults_of_peft_stay(tmp_path, base_folder, caplog):
    found = trainer(tmp_path, base_folder, LoraConfig(r=4, task_type="CAUSAL_LM")).model
    assert adapted(found) == {"q_proj", "v_proj"} and "target_modules" not in caplog.text


@pytest.mark.parametrize(
    "config",
    [LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM"), IA3Config(task_type="CAUSAL_LM")],
    ids=["not there", "not inferred"],
)
def test_candidates_are_named(tmp_path, config):
    model = toy.save_model(olmo(), tmp_path / "base")
    with pytest.raises(ConfigurationError) as caught:
        trainer(tmp_path / "run", model, config)
    message = str(caught.value)
    assert (
        f"{type(config).__name__}(target_modules=...)" in message
        and "--lora_target_modules" in caught.value.in_terminal
    )
    assert str(LINEAR) in message and "'all-linear'" in message


def said_of_learning(caplog):
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [message for message in messages if "own training rows moved by" in message]


@pytest.mark.parametrize(
    ("rate", "remedy"),
    [
        (2e-5, r"Raise learning_rate, found 2e-05: adapters usually take 0.0001 to 0.001\."),
        (1e-4, r"Train for more steps, or raise learning_rate, found 0.0001\."),
    ],
)
def test_a_training_that_has_learnt_nothing_says_so(tmp_path, base_folder, caplog, rate, remedy):
    trainer = sft_trainer(tmp_path / "run", base_folder, learning_rate=rate, num_train_epochs=1)
    trainer.open_run()
    trained = trainer.flow.training.run("one", ["sums"], tmp_path / "one")
    (message,) = said_of_learning(caplog)
    assert message.startswith(f"one: the loss of its own training rows moved by 0.0% in {trained.global_step} steps")
    assert re.search(remedy, message)


def test_trainings_that_learn_say_nothing(tmp_path, base_folder, caplog):
    trainer = sft_trainer(tmp_path / "run", base_folder, num_train_epochs=1)
    trainer.open_run()
    for name in trainer.tasks:
        trainer.flow.training.run(name, [name], tmp_path / name)
    assert said_of_learning(caplog) == []


def test_looking_at_the_loss_changes_no_training(tmp_path, base_folder, monkeypatch):
    def distance(folder):
        trainer = sft_trainer(tmp_path / folder, base_folder, num_train_epochs=1)
        trainer.open_run()
        return trainer.flow.training.run("one", ["sums"], tmp_path / folder / "one").distance

    found = distance("run")
    monkeypatch.setattr("hf_ensemble.train.flows.learning.LearningCheck._loss", lambda self: 0.0)
    assert distance("other") == found


def test_the_rate_that_is_found_is_that_of_a_given_optimizer(tmp_path, base_folder, caplog):
    tasks = toy.sft_tasks()
    found = EnsembleSFTTrainer(
        model=base_folder,
        args=sft_config(tmp_path / "run", num_train_epochs=1),
        train_dataset=split(tasks, "train"),
        eval_dataset=split(tasks, "validation"),
        peft_config=toy.lora(),
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 2e-5}),
    )
    found.open_run()
    found.flow.training.run("one", ["sums"], tmp_path / "one")
    (message,) = said_of_learning(caplog)
    assert "Raise lr of optimizer_cls_and_kwargs, found 2e-05: adapters usually take" in message
