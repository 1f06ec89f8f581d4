"""The recipe that is replayed is the training that is run."""

import numpy as np
import pytest
import torch
from peft import IA3Config, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments

from helpers import toy
from helpers.captures import capture
from helpers.trainers import sft_config, split
from hf_ensemble import DataSelector, EnsembleSFTTrainer, TaskSet, TrainingRecipe
from hf_ensemble.capture import optimizer_preconditioner, training_recipe
from hf_ensemble.capture.training_arguments import fresh_lora_gain, learning_rates


def trainer_with(folder, base, tasks=None, optimizer=None, **settings):
    tasks = tasks or toy.sft_tasks()
    return EnsembleSFTTrainer(
        model=base,
        args=sft_config(folder, logging_strategy="steps", logging_steps=1, **settings),
        train_dataset=split(tasks, "train"),
        eval_dataset=split(tasks, "validation"),
        peft_config=toy.lora(),
        optimizer_cls_and_kwargs=optimizer,
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
    trained = trainer.flow.training.run("all", trainer.tasks.names, tmp_path / "all")
    logged = [entry["learning_rate"] for entry in trained.log_history if "learning_rate" in entry]
    num_steps = trainer.flow.training.num_steps(trainer.tasks.names)
    assert learning_rates(trainer.args, num_steps) == pytest.approx(logged)
    recipe = trainer.capture().recipe
    assert recipe.learning_rates == pytest.approx(logged)
    assert recipe.fixed_steps == ("max_steps" in settings)
    assert recipe.batch_size == trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps


def test_sampling_weights_lengthen_the_training(tmp_path, base_folder):
    tasks = TaskSet.from_datasets(toy.sft_tasks(), sampling_weights={"sums": 2.0})
    trainer = EnsembleSFTTrainer(
        model=base_folder, args=sft_config(tmp_path), train_dataset=tasks, peft_config=toy.lora()
    )
    trainer.open_run()
    trained = trainer.flow.training.run("all", tasks.names, tmp_path / "all")
    assert trainer.flow.training.num_steps(tasks.names) == trained.global_step


def test_long_trainings_are_put_together():
    args = TrainingArguments(use_cpu=True, lr_scheduler_type="linear", learning_rate=1e-3)
    recipe = training_recipe(args, 10_000)
    assert len(recipe.learning_rates) == 200
    assert sum(recipe.learning_rates) == pytest.approx(sum(learning_rates(args, 10_000)))


def test_a_metric_that_is_not_the_optimizers_cannot_be_replayed(tmp_path, base_folder):
    assert trainer_with(tmp_path / "adam", base_folder).capture().recipe.num_parameters > 1
    store = trainer_with(tmp_path / "sgd", base_folder, optim="sgd").capture()
    assert store.preconditioner() is None and store.recipe.num_parameters is None
    assert trainer_with(tmp_path / "mixed", base_folder, preconditioner="none").capture().recipe is None


def test_a_finished_store_is_told_of_another_training(tmp_path):
    store = capture(tmp_path)
    assert store.recipe is None
    assert DataSelector.from_store(store, num_components=10).estimator.regularization.evidence == "validation_loss"
    for rate in (1e-3, 1e-2):
        assert capture(tmp_path, recipe=TrainingRecipe(np.full(5, rate), 4)).recipe.learning_rates == [rate] * 5
    # Opening it once more takes nothing away.
    store = capture(tmp_path)
    assert DataSelector.from_store(store, num_components=10).estimator.regularization.evidence == "replay"


def test_input_gain_is_how_much_a_response_grows(tmp_path, base_folder):
    trainer = trainer_with(tmp_path / "fresh", base_folder)
    gains, sizes = [], []
    for name, a in trainer.model.named_parameters():
        if "lora_A" in name:
            b = trainer.model.get_parameter(name.replace("lora_A", "lora_B"))
            # Along the signs of a random input, by a small step.
            x = torch.randn(2000, a.shape[1], generator=torch.Generator().manual_seed(0))
            grown = 1e-3 * x.sign() * x
            gains.append(float(grown.sum(1).mean() / 1e-3 / (x @ a.detach().T).square().mean().sqrt()))
            sizes.append(b.numel())
    # |x|_1 is sqrt(2 / pi) of sqrt(n) |x| for random inputs.
    expected = np.average(gains, weights=sizes) / (2 / np.pi) ** 0.5
    assert fresh_lora_gain(trainer.model) == pytest.approx(expected, rel=0.05)
    assert trainer.capture().recipe.input_gain == fresh_lora_gain(trainer.model)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert fresh_lora_gain(trainer.model) == 0.0


def test_adapters_without_a_fresh_start_do_not_grow(base_folder):
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    assert fresh_lora_gain(base) == 0.0
    ia3 = get_peft_model(
        base,
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    )
    assert fresh_lora_gain(ia3) == 0.0


def test_what_cannot_be_replayed_has_no_recipe():
    for settings in ({"optim": "adagrad"}, {"learning_rate": 0.0}, {"max_steps": 1, "warmup_steps": 10}):
        args = TrainingArguments(use_cpu=True, **settings)
        assert training_recipe(args, max(args.max_steps, 4 if args.max_steps < 0 else 1)) is None
    assert optimizer_preconditioner(TrainingArguments(use_cpu=True, optim="lomo")) == "none"


def test_some_of_the_tasks_are_trained_on_for_fewer_steps(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "hf_ensemble.estimate.linearized_training.replayed_coefficients",
        lambda features, margin, weights, norms, scale, recipe, tokens: seen.append(recipe) or 0.1 * features.mean(0),
    )
    recipe = TrainingRecipe([0.3, 0.6], 4)
    store = capture(tmp_path / "all", recipe=recipe)
    DataSelector.from_store(store, ["sums"], num_components=10)
    assert seen[0].learning_rates == pytest.approx([0.1, 0.2])
    # Sampled rows stand for all of their task.
    sampled = capture(tmp_path / "some", recipe=recipe, capture_rows={"diffs": 4})
    DataSelector.from_store(sampled, ["sums"], num_components=10)
    assert seen[1].learning_rates == pytest.approx([0.1, 0.2])
    # A task that is not used may have no training rows.
    rows = store.rows.select(["split", "task"]).to_pylist()
    excluded = [row == {"split": "train", "task": "diffs"} for row in rows]
    store.rows = store.rows.set_column(store.rows.column_names.index("excluded"), "excluded", [excluded])
    DataSelector.from_store(store, ["sums"], num_components=10)
    assert seen[2].learning_rates == pytest.approx([0.15, 0.3])


class Mine(torch.optim.AdamW):
    """Of the user's."""


GIVEN = (torch.optim.SGD, {"lr": 0.5})


def test_a_given_optimizer_is_predicted_as_the_same_one_by_name(tmp_path, base_folder):
    settings = {"train_baseline": False, "calibration_runs": 0}
    given = trainer_with(tmp_path / "given", base_folder, optimizer=GIVEN, **settings)
    named = trainer_with(tmp_path / "named", base_folder, optim="sgd", learning_rate=0.5, **settings)
    mixtures = [["sums"], ["sums", "diffs"]]
    stores, losses = [], []
    for trainer in (given, named):
        stores.append(trainer.capture())
        losses.append(trainer.selector().estimator.predict_subsets(mixtures).loss)
    assert stores[0].identity["config"] == stores[1].identity["config"]
    assert stores[0].preconditioner() is None and stores[0].recipe == stores[1].recipe
    assert np.array_equal(*losses)
    trained = given.flow.training.run("all", given.tasks.names, tmp_path / "all")
    logged = [entry["learning_rate"] for entry in trained.log_history if "learning_rate" in entry]
    assert stores[0].recipe.learning_rates == pytest.approx(logged) and max(logged) == 0.5


@pytest.mark.parametrize(
    ("optimizer", "preconditioner", "rate"),
    [
        (GIVEN, "none", 0.5),
        ((torch.optim.SGD, {}), "none", 1e-3),
        ((torch.optim.SGD, {"lr": 0.5, "momentum": 0.0}), "none", 0.5),
        ((torch.optim.AdamW, {"lr": torch.tensor(0.25)}), "adam", 0.25),
        ((torch.optim.NAdam, {}), "adam", 2e-3),
        ((Mine, {"lr": 0.3}), "adam", 0.3),
    ],
)
def test_the_recipe_is_that_of_the_given_optimizer(optimizer, preconditioner, rate, caplog):
    args = TrainingArguments(use_cpu=True, lr_scheduler_type="constant", optim="adagrad", learning_rate=1e-5)
    assert optimizer_preconditioner(args, optimizer) == preconditioner
    assert training_recipe(args, 3, optimizer).learning_rates == [rate] * 3 and not caplog.text


@pytest.mark.parametrize(
    ("optimizer", "preconditioner", "reason"),
    [
        (
            (torch.optim.Adagrad, {"lr": 0.1}),
            "adam",
            "Adagrad is related neither to Adam nor to plain gradient descent",
        ),
        ((torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), "none", "SGD with momentum=0.9"),
        ((torch.optim.AdamW, {"lr": 0.1, "params": []}), "adam", "params of AdamW may have learning rates of its own"),
        ((lambda params, **options: torch.optim.AdamW(params), {}), "adam", "is related neither to Adam"),
        ((type("Adamant", (torch.optim.Optimizer,), {"__init__": lambda self, params: None}), {}), "adam", "no lr"),
    ],
)
def test_a_given_optimizer_that_cannot_be_replayed_is_warned_of(optimizer, preconditioner, reason, caplog):
    args = TrainingArguments(use_cpu=True)
    assert optimizer_preconditioner(args, optimizer) == preconditioner
    assert training_recipe(args, 3, optimizer) is None
    assert reason in caplog.text and "set optim and learning_rate" in caplog.text


def test_a_run_of_such_an_optimizer_has_no_recipe(tmp_path, base_folder, caplog):
    optimizer = (torch.optim.SGD, {"lr": 0.5, "momentum": 0.9})
    store = trainer_with(tmp_path / "run", base_folder, optimizer=optimizer).capture()
    assert store.recipe is None and store.preconditioner() is None
    assert "SGD with momentum=0.9 is no plain gradient descent" in caplog.text
