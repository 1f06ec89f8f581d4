import pytest
import torch
from peft import get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from helpers import toy
from helpers.captures import relative_error
from hf_ensemble import CaptureConfig, DataSelector, GradientCaptureCallback, TaskSet
from hf_ensemble.errors import ConfigurationError, StoreError, StoreMismatchError, WriteError
from hf_ensemble.store import GradientStore
from hf_ensemble.tasks import RowFormat, encode

SETTINGS = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "logging_steps": 1,
}


def train(kind, folder, callbacks, **given):
    """A plain training with dropout; returns its losses and its final parameters."""
    tasks = TaskSet.from_datasets(toy.sft_tasks())
    torch.manual_seed(0)
    model = get_peft_model(toy.llama(), toy.lora(lora_dropout=0.3))
    table, tokenizer = tasks.table("train"), toy.tokenizer()
    if kind == "sft":
        args = SFTConfig(output_dir=str(folder), bf16=False, **SETTINGS)
        trainer = SFTTrainer(model, args, train_dataset=table, processing_class=tokenizer, callbacks=callbacks, **given)
    else:
        rows = encode(table, tokenizer, RowFormat.PROMPT_COMPLETION).remove_columns(["task", "example_id"])
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
        args = TrainingArguments(output_dir=str(folder), **SETTINGS)
        trainer = Trainer(model, args, collator, rows, processing_class=tokenizer, callbacks=callbacks, **given)
    trainer.train()
    losses = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
    return losses, {name: p.clone() for name, p in model.named_parameters()}


def callback(folder, **changes):
    config = CaptureConfig(projection_dim=64, batch_size=5)
    return GradientCaptureCallback(TaskSet.from_datasets(toy.sft_tasks()), folder, config, **changes)


@pytest.mark.parametrize("kind", ["trainer", "sft"])
@pytest.mark.parametrize("when", ["train_begin", "train_end", "epoch", 7])
def test_training_is_the_same_to_the_last_bit(tmp_path, kind, when):
    own = callback(tmp_path / "store", when=when)
    with_losses, with_parameters = train(kind, tmp_path / "a", [own])
    losses, parameters = train(kind, tmp_path / "b", None)
    assert len(losses) == 18 and losses == with_losses
    assert all(torch.equal(value, with_parameters[name]) for name, value in parameters.items())
    assert len(own.store) == 54
    # A training like this one may follow on its beginning and on its end.
    assert (own.store.recipe is None) == (when not in ("train_begin", "train_end"))
    folders = {"epoch": ["epoch-1", "epoch-2"], 7: ["step-14", "step-7"]}.get(when)
    if folders is not None:
        assert sorted(path.name for path in (tmp_path / "store").iterdir() if path.is_dir()) == folders
        points = {GradientStore(tmp_path / "store" / name).identity["model"]["theta0"] for name in folders}
        assert len(points) == 2
    selector = DataSelector.from_store(own.store, num_components=20)
    assert selector.select("sums").targets == {"sums": 1.0}


@pytest.mark.parametrize(
    ("length", "names"),
    [
        ({"num_train_epochs": 2.2}, ["epoch-1", "epoch-2", "epoch-3-step-20"]),
        ({"max_steps": 13}, ["epoch-1", "epoch-2-step-13"]),
        ({"max_steps": 4}, ["epoch-1-step-4"]),
        ({"max_steps": 18}, ["epoch-1", "epoch-2"]),
    ],
    ids=str,
)
def test_an_epoch_that_is_not_finished_has_a_store_of_its_own(tmp_path, monkeypatch, length, names):
    for name, value in length.items():
        monkeypatch.setitem(SETTINGS, name, value)
    train("sft", tmp_path / "run", [callback(tmp_path / "store", when="epoch")])
    assert sorted(path.name for path in (tmp_path / "store").iterdir() if path.is_dir()) == names
    points = {GradientStore(tmp_path / "store" / name).identity["model"]["theta0"] for name in names}
    assert len(points) == len(names)


def test_early_stopping_within_an_epoch_ends_the_training(tmp_path):
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 11

    train("trainer", tmp_path / "run", [callback(tmp_path / "store", when="epoch"), Stops()])
    assert {path.name for path in (tmp_path / "store").iterdir() if path.is_dir()} == {"epoch-1", "epoch-2-step-11"}


def test_begin_and_end_capture_different_points(tmp_path):
    begin, end = callback(tmp_path / "begin"), callback(tmp_path / "end", when="train_end")
    train("sft", tmp_path / "run", [begin, end])
    assert begin.store.identity["model"]["theta0"] != end.store.identity["model"]["theta0"]
    assert begin.store.identity["model"]["base_weights"] == end.store.identity["model"]["base_weights"]
    # The end store belongs to the trained parameters: it is refused as a store of the untrained ones.
    with pytest.raises(StoreMismatchError, match="theta0"):
        train("sft", tmp_path / "again", [callback(tmp_path / "end")])
    train("sft", tmp_path / "over", [callback(tmp_path / "end", overwrite=True)])
    assert GradientStore(tmp_path / "end").identity == begin.store.identity


def test_a_store_of_another_training_costs_no_trained_weights(tmp_path, caplog):
    train("sft", tmp_path / "run", [callback(tmp_path / "store", when="train_end")])
    before = GradientStore(tmp_path / "store").identity
    config = CaptureConfig(projection_dim=32, batch_size=5)
    tasks = TaskSet.from_datasets(toy.sft_tasks())
    own = GradientCaptureCallback(tasks, tmp_path / "store", config, when="train_end")
    losses, _ = train("sft", tmp_path / "again", [own])
    assert len(losses) == 18 and own.store is None and GradientStore(tmp_path / "store").identity == before
    assert "The gradients were not captured" in caplog.text and "overwrite=True" in caplog.text


@pytest.mark.parametrize("when", ["train_end", "epoch", 7])
def test_a_full_disk_costs_no_trained_weights(tmp_path, caplog, monkeypatch, when):
    def fails(*args, **kwargs):
        raise WriteError("no space is left")

    monkeypatch.setattr("hf_ensemble.callbacks.gradient_capture.capture_gradients", fails)
    losses, _ = train("sft", tmp_path / "run", [callback(tmp_path / "store", when=when)])
    assert len(losses) == 18 and "The gradients were not captured" in caplog.text


def test_a_resumed_training_keeps_what_was_captured_at_its_beginning(tmp_path):
    own = callback(tmp_path / "store")
    train("sft", tmp_path / "run", [own])
    resumed = callback(tmp_path / "store")
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    resumed.on_train_begin(args, TrainerState(global_step=3), None, model=None, processing_class=toy.tokenizer())
    assert resumed.store.identity == own.store.identity
    with pytest.raises(StoreError, match="Capture gradients first"):
        callback(tmp_path / "none").on_train_begin(args, TrainerState(global_step=3), None)


def test_bad_arguments_are_named(tmp_path):
    for when in ("sometimes", 0, -3, True):
        with pytest.raises(ConfigurationError, match="when has to be"):
            callback(tmp_path, when=when)
    with pytest.raises(ConfigurationError, match="Pass processing_class"):
        callback(tmp_path).on_train_begin(TrainingArguments(output_dir=str(tmp_path), use_cpu=True), None, None)


def test_a_bfloat16_training_is_captured_in_bfloat16_and_unchanged(tmp_path, monkeypatch):
    monkeypatch.setitem(SETTINGS, "max_steps", 2)

    def run(folder, callbacks):
        torch.manual_seed(0)
        args = SFTConfig(output_dir=str(folder), bf16=True, **SETTINGS)
        table = TaskSet.from_datasets(toy.sft_tasks()).table("train")
        model = get_peft_model(toy.llama(), toy.lora())
        trainer = SFTTrainer(model, args, train_dataset=table, processing_class=toy.tokenizer(), callbacks=callbacks)
        trainer.train()
        return {name: p.clone() for name, p in trainer.model.named_parameters()}

    own = callback(tmp_path / "store")
    captured, plain = run(tmp_path / "a", [own]), run(tmp_path / "b", None)
    assert own.store.identity["config"]["mixed_precision"] == "bf16"
    assert own.store.identity["config"]["preconditioner"] == "adam" and own.store.recipe is not None
    assert all(torch.equal(value, plain[name]) for name, value in captured.items())
    alone = callback(tmp_path / "alone")
    alone.on_train_begin(
        SFTConfig(output_dir=str(tmp_path), bf16=True, **SETTINGS),
        TrainerState(max_steps=2),
        None,
        model=get_peft_model(toy.llama(), toy.lora()),
        processing_class=toy.tokenizer(),
    )
    # The forward that accelerate had wrapped gives the same features as one that it had not.
    found, expected = (store.table("train").features[:] for store in (own.store, alone.store))
    assert relative_error(torch.from_numpy(found), torch.from_numpy(expected)) < 1e-3


@pytest.mark.parametrize("when", ["train_begin", "train_end"])
@pytest.mark.parametrize(
    ("optimizer", "preconditioner", "rate"),
    [
        (None, "adam", 1e-2),
        ((torch.optim.SGD, {"lr": 0.5}), "none", 0.5),
        ((torch.optim.AdamW, {"lr": 0.25}), "adam", 0.25),
        ((torch.optim.SGD, {"lr": 0.5, "momentum": 0.9}), "none", None),
    ],
    ids=["arguments", "sgd", "adam", "momentum"],
)
def test_the_recipe_is_that_of_the_optimizer_that_trains(tmp_path, when, optimizer, preconditioner, rate, caplog):
    own = callback(tmp_path / "store", when=when)
    train("trainer", tmp_path / "run", [own], optimizer_cls_and_kwargs=optimizer)
    assert own.store.identity["config"]["preconditioner"] == preconditioner
    assert (own.store.recipe and own.store.recipe.learning_rates[0]) == rate
    assert ("cannot be replayed" in caplog.text) == (rate is None)
