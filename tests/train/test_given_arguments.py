"""Arguments of a parent's class, of a class of the user's, and of another trainer's."""

import copy
import pickle
from dataclasses import dataclass
from enum import Enum

import pytest
from datasets import Dataset
from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments
from trl import DPOConfig, SFTConfig

from helpers import toy
from helpers.trainers import SMALL, split
from hf_ensemble import (
    EnsembleConfig,
    EnsembleSFTConfig,
    EnsembleSFTTrainer,
    EnsembleTrainer,
    SelectionConfig,
    SelectionSFTConfig,
    SelectionTrainer,
)
from hf_ensemble.errors import ConfigurationError, RunMismatchError
from hf_ensemble.train.credentials import arguments_without_secrets
from hf_ensemble.train.inputs.given_arguments import as_config

OURS = {
    "EnsembleTrainer": EnsembleConfig,
    "EnsembleSFTTrainer": EnsembleSFTConfig,
    "SelectionTrainer": SelectionConfig,
    "SelectionSFTTrainer": SelectionSFTConfig,
}
PLAIN = {**SMALL, "bf16": False}
TASKS = toy.sft_tasks()


class Shape(Enum):
    ROUND = "round"


@dataclass
class MyArguments(TrainingArguments):
    alpha: float = 0.5
    shape: Shape = Shape.ROUND
    service_token: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.twice = 2 * self.alpha


@dataclass
class MySFTConfig(SFTConfig):
    alpha: float = 0.5


class Scaled(EnsembleSFTTrainer):
    seen: list[tuple[str, float]] = []

    def compute_loss(self, *args, **kwargs):
        Scaled.seen.append((self.args.output_dir.rsplit("/", 1)[1], self.args.alpha))
        return self.args.alpha * super().compute_loss(*args, **kwargs)


def scaled(args, base, rows, **given):
    Scaled.seen = []
    return Scaled(base, args, train_dataset=rows, **given)


def test_fields_of_a_class_of_the_users_reach_every_training(tmp_path, base_folder):
    args = MySFTConfig(output_dir=str(tmp_path / "run"), alpha=0.25, **PLAIN)
    rows = {"train_dataset": split(TASKS, "train"), "eval_dataset": split(TASKS, "validation")}
    trainer = Scaled(base_folder, args, **rows, peft_config=toy.lora())
    Scaled.seen = []
    trainer.train()
    assert trainer.args.alpha == 0.25 and isinstance(trainer.args, EnsembleSFTConfig)
    assert "baseline" in {name for name, _ in Scaled.seen} and {alpha for _, alpha in Scaled.seen} == {0.25}
    # They may decide what is trained.
    args.alpha = 0.75
    with pytest.raises(RunMismatchError, match=r"arguments.alpha: found 0.25, expected 0.75"):
        Scaled(base_folder, args, **rows, peft_config=toy.lora()).open_run()


@pytest.mark.parametrize("rows", [Dataset.from_list(TASKS["sums"]["train"]), split(TASKS, "train")], ids=["one", "all"])
def test_fields_of_a_class_of_the_users_reach_a_single_model(tmp_path, base_folder, rows):
    args = MySFTConfig(output_dir=str(tmp_path / "run"), alpha=0.25, max_steps=1, **PLAIN)
    scaled(args, base_folder, rows).train()
    assert Scaled.seen and {alpha for _, alpha in Scaled.seen} == {0.25}


def test_a_configuration_with_kept_fields_is_copied_written_and_told(tmp_path):
    args = MyArguments(output_dir=str(tmp_path), alpha=0.25, service_token="abc", **SMALL)
    config = as_config(args, EnsembleConfig, "EnsembleTrainer")
    for own in (config, copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert (own.alpha, own.twice, own.shape, own.service_token) == (0.25, 0.5, Shape.ROUND, "abc")
        assert own.to_dict()["alpha"] == 0.25 and own.to_dict()["shape"] == "round"
        assert "service_token" not in own.to_dict() and "twice" not in own.to_dict()
    assert "alpha" not in EnsembleConfig(output_dir=str(tmp_path), **SMALL).to_dict()
    written = arguments_without_secrets(config)
    assert (written.alpha, written.service_token) == (0.25, None)


@pytest.mark.parametrize("trainer", OURS)
@pytest.mark.parametrize(
    "given", [TrainingArguments, Seq2SeqTrainingArguments, SFTConfig, DPOConfig, MySFTConfig, *OURS.values()]
)
def test_defaults_of_every_class_are_taken(tmp_path, trainer, given):
    args = given(output_dir=str(tmp_path), **PLAIN)
    config = as_config(args, OURS[trainer], trainer)
    assert isinstance(config, OURS[trainer]) and config.output_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("trainer", "given", "changes", "advice"),
    [
        ("EnsembleTrainer", SFTConfig, {"packing": True}, "or use EnsembleSFTTrainer"),
        ("EnsembleTrainer", SFTConfig, {"max_length": 6}, "or use EnsembleSFTTrainer"),
        ("EnsembleTrainer", MySFTConfig, {"packing": True}, "or use EnsembleSFTTrainer"),
        ("SelectionTrainer", SFTConfig, {"completion_only_loss": True}, "or use SelectionSFTTrainer"),
        ("SelectionTrainer", EnsembleConfig, {"num_groups": 2}, "or use EnsembleTrainer"),
        ("SelectionSFTTrainer", EnsembleSFTConfig, {"num_groups": 2}, "or use EnsembleSFTTrainer"),
        ("EnsembleTrainer", Seq2SeqTrainingArguments, {"predict_with_generate": True}, "out; answer_metrics="),
        ("EnsembleSFTTrainer", DPOConfig, {"beta": 0.3}, "Leave that out"),
    ],
)
def test_what_a_trainer_cannot_honour_is_refused_by_name(tmp_path, trainer, given, changes, advice):
    args = given(output_dir=str(tmp_path), **PLAIN, **changes)
    ((name, value),) = changes.items()
    with pytest.raises(ConfigurationError, match=f"{trainer} can honour, found .*{name}={value}.*{advice}"):
        as_config(args, OURS[trainer], trainer)


def test_it_is_refused_in_the_constructor_whether_there_is_an_adapter_or_not(tmp_path):
    for peft_config in (toy.lora(), None):
        with pytest.raises(ConfigurationError, match="found packing=True of SFTConfig.*EnsembleSFTTrainer"):
            EnsembleTrainer(
                toy.llama(),
                SFTConfig(output_dir=str(tmp_path), packing=True, **PLAIN),
                train_dataset=split(TASKS, "train"),
                processing_class=toy.tokenizer(),
                peft_config=peft_config,
            )


def test_over_one_dataset_arguments_of_any_class_are_taken_as_the_parent_takes_them(tmp_path):
    rows = Dataset.from_list([{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 4)
    for args in (
        Seq2SeqTrainingArguments(str(tmp_path), predict_with_generate=True, **SMALL),
        SFTConfig(str(tmp_path), packing=True, **PLAIN),
    ):
        trainer = EnsembleTrainer(toy.llama(), args, train_dataset=rows)
        assert getattr(trainer.args, "predict_with_generate", False) or trainer.args.packing
        assert set(args.to_dict()) <= set(trainer.args.to_dict())
        assert trainer.train().training_loss > 0


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 0.0},
        {"num_train_epochs": 0},
        {"seed": -1},
        {"max_steps": -5},
        {"per_device_eval_batch_size": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("trainer", OURS)
def test_over_one_dataset_values_are_those_that_the_parent_takes(tmp_path, trainer, values):
    given = SFTConfig if "SFT" in trainer else TrainingArguments
    args = given(output_dir=str(tmp_path), **{**PLAIN, **values})
    config = as_config(args, OURS[trainer], trainer, is_parent=True)
    ((name, value),) = values.items()
    assert getattr(config, name) == value
    # A run is not made of trainings that train nothing.
    with pytest.raises(ConfigurationError, match=f"{name}.*has to be|batch_size has to be"):
        as_config(args, OURS[trainer], trainer)


def test_a_learning_rate_of_0_trains_nothing_as_in_the_parent(tmp_path):
    rows, losses = Dataset.from_list([{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 4), []
    for trainer_class in (Trainer, EnsembleTrainer):
        args = TrainingArguments(str(tmp_path), **{**PLAIN, "learning_rate": 0.0})
        losses.append(trainer_class(toy.llama(), args, train_dataset=rows).train().training_loss)
    assert losses[0] == losses[1]


def test_a_selection_refuses_arguments_of_an_ensemble(tmp_path):
    with pytest.raises(ConfigurationError, match="num_groups=2 of EnsembleConfig.*use EnsembleTrainer"):
        SelectionTrainer(
            toy.bert(4),
            EnsembleConfig(output_dir=str(tmp_path), num_groups=2, **SMALL),
            train_dataset=split(toy.text_tasks(), "train"),
            processing_class=toy.tokenizer(),
            peft_config=toy.lora("SEQ_CLS"),
            target="films",
        )
