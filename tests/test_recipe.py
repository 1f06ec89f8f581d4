"""The recipe that is replayed is the training that is run."""

import pytest
import toy
from test_train import sft_config, split

from hf_ensemble import EnsembleSFTTrainer
from hf_ensemble.train.recipe import learning_rates, training_recipe


def trainer_with(folder, base, tasks=None, **settings):
    tasks = tasks or toy.sft_tasks()
    return EnsembleSFTTrainer(
        model=base,
        args=sft_config(folder, logging_strategy="steps", logging_steps=1, **settings),
        train_dataset=split(tasks, "train"),
        eval_dataset=split(tasks, "validation"),
        peft_config=toy.lora(),
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scheduler_type": "cosine", "warmup_steps": 3},
        {"gradient_accumulation_steps": 2, "num_train_epochs": 1.5},
        {"max_steps": 7, "lr_scheduler_type": "constant"},
    ],
)
def test_learning_rates_are_those_of_the_training(tmp_path, base_folder, settings):
    trainer = trainer_with(tmp_path / "run", base_folder, **settings)
    trainer.open_run()
    trainer.adapter_training.run("all", trainer.tasks.names, tmp_path / "all")
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    rates, batch_size = learning_rates(trainer)
    assert rates == pytest.approx(logged)
    assert batch_size == trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps


def test_a_metric_that_is_not_the_optimizers_cannot_be_replayed(tmp_path, base_folder):
    trainer = trainer_with(tmp_path / "adam", base_folder)
    assert training_recipe(trainer, trainer.capture()).num_parameters > 1
    trainer = trainer_with(tmp_path / "sgd", base_folder, optim="sgd")
    store = trainer.capture()
    assert store.preconditioner() is None and training_recipe(trainer, store).num_parameters is None
    trainer = trainer_with(tmp_path / "mixed", base_folder, preconditioner="none")
    assert training_recipe(trainer, trainer.capture()) is None
