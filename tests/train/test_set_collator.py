"""A collator that is set on a trainer after its constructor counts as one that the constructor was given."""

import pytest
from transformers import DataCollatorWithPadding
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from helpers import toy
from helpers.trainers import sft_config, sft_trainer, split, text_trainer, without_speed
from hf_ensemble import EnsembleSFTTrainer
from hf_ensemble.errors import ConfigurationError, RunMismatchError

SHORT = {"num_groups": 2, "num_train_epochs": 1}


class Counting(DataCollatorForLanguageModeling):
    """Batches that are padded to a length of their own."""

    def torch_call(self, examples):
        self.batches = getattr(self, "batches", 0) + 1
        return super().torch_call(examples)


class Padding(DataCollatorWithPadding):
    def __call__(self, features):
        self.batches = getattr(self, "batches", 0) + 1
        return super().__call__(features)


def run(kind, folder, base, collator, at_once, **settings):
    tasks = toy.sft_tasks(8, 4) if kind == "sft" else toy.text_tasks(8)
    settings = {**SHORT, **settings}
    given = {"data_collator": collator} if at_once else {}
    if kind == "sft":
        rows = {"train_dataset": split(tasks, "train"), "eval_dataset": split(tasks, "validation")}
        trainer = EnsembleSFTTrainer(base, sft_config(folder, **settings), **rows, peft_config=toy.lora(), **given)
    else:
        trainer = text_trainer(folder, toy.bert(4), tasks, **settings, **given)
    if not at_once:
        trainer.data_collator = collator
    return trainer


@pytest.mark.parametrize("kind", ["sft", "text"])
def test_all_trainings_and_scores_are_of_its_batches(tmp_path, base_folder, kind):
    found = {}
    for at_once in (True, False):
        collator = Counting(0, pad_to_multiple_of=8) if kind == "sft" else Padding(toy.tokenizer())
        trainer = run(kind, tmp_path / str(at_once), base_folder, collator, at_once)
        metrics = {k: v for k, v in without_speed(trainer.train().metrics).items() if "runtime" not in k}
        found[at_once] = metrics, trainer.run_directory.trainings()[0].global_step, collator.batches
    assert found[True] == found[False] and found[False][2] > 20


def test_a_run_is_compared_by_it(tmp_path, base_folder):
    run("sft", tmp_path, base_folder, Counting(0), at_once=True).open_run()
    run("sft", tmp_path, base_folder, Counting(0), at_once=False).open_run()
    with pytest.raises(RunMismatchError, match="trainer_arguments.data_collator"):
        sft_trainer(tmp_path, base_folder, toy.sft_tasks(8, 4), **SHORT).open_run()


def test_one_model_on_all_datasets_is_trained_on_its_batches(tmp_path, base_folder):
    tasks, losses = toy.sft_tasks(8, 4), []
    for at_once in (True, False):
        collator = Counting(0)
        args = sft_config(tmp_path, max_steps=3, task_loss_weighting="tasks", num_groups=None)
        given = {"data_collator": collator} if at_once else {}
        trainer = EnsembleSFTTrainer(base_folder, args, train_dataset=split(tasks, "train"), **given)
        if not at_once:
            trainer.data_collator = collator
        losses.append(trainer.train().training_loss)
        assert collator.batches >= 3
    assert losses[0] == losses[1]


def test_it_is_refused_before_anything_is_trained_where_batches_have_no_padding(tmp_path, base_folder):
    trainer = run("sft", tmp_path, base_folder, Counting(0), at_once=False, padding_free=True, max_length=None)
    with pytest.raises(ConfigurationError, match="Expected trl's data collator.* set to a Counting. Leave it"):
        trainer.train()
