"""The best adapter of a training, early stopping and learning rates that follow its evaluations."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from helpers import toy
from helpers.trainers import SMALL, sft_config, sft_trainer, split
from hf_ensemble import EnsembleSFTConfig, EnsembleSFTTrainer, SelectionSFTConfig, SelectionSFTTrainer
from hf_ensemble.errors import ConfigurationError, RunMismatchError
from hf_ensemble.train.task_trainer import TaskSFTTrainer

# Far too high a rate: the loss falls, and rises again.
EVALUATED = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_strategy": "steps",
    "logging_steps": 1,
    "learning_rate": 0.08,
    "lr_scheduler_type": "constant",
    "num_train_epochs": 2,
}
BEST = {**EVALUATED, "load_best_model_at_end": True}


def weights(folder):
    return load_file(str(Path(folder) / "adapter_model.safetensors"))


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(value, found[key]) for key, value in expected.items())


class Checkpoints(TrainerCallback):
    """Keeps the adapter of every checkpoint."""

    def __init__(self):
        self.adapters = {}

    def on_save(self, args, state, control, **kwargs):
        name = Path(args.output_dir).name
        self.adapters[name, state.global_step] = weights(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def train(folder, base, tasks, name="one", callbacks=(), **changes):
    """One training of a run, its record, its adapter and its log."""
    trainer = sft_trainer(folder, base, callbacks=list(callbacks), **changes)
    trainer.open_run()
    trained = trainer.flow.training.run(name, tasks, Path(folder) / name)
    return trained, weights(Path(folder) / name), trained.log_history


def metric_by_step(log, metric):
    return {entry["step"]: entry[metric] for entry in log if metric in entry}


def test_the_best_adapter_by_the_mean_over_the_trainings_tasks_is_kept(tmp_path, base_folder):
    kept = Checkpoints()
    trained, adapter, log = train(tmp_path / "run", base_folder, ["sums", "diffs"], callbacks=[kept], **BEST)
    losses = metric_by_step(log, "eval_loss")
    by_task = [metric_by_step(log, f"eval_{task}_loss") for task in ("sums", "diffs")]
    assert losses == pytest.approx({step: (by_task[0][step] + by_task[1][step]) / 2 for step in losses})
    best = min(losses, key=losses.get)
    assert best < trained.global_step == 12
    assert (trained.best_step, trained.best_metric) == (best, losses[best])
    assert trained.metric_for_best_model == "eval_loss" and trained.epoch == pytest.approx(best / 6)
    assert equal(adapter, kept.adapters["one", best])
    assert not equal(adapter, kept.adapters["one", 12])
    assert not list((tmp_path / "run").rglob("checkpoint-*"))


def test_a_metric_of_one_task_is_that_of_the_trainings_with_the_task(tmp_path, base_folder, caplog):
    changes = {**BEST, "metric_for_best_model": "eval_sums_loss"}
    with_it, _, log = train(tmp_path / "with", base_folder, ["sums", "diffs"], **changes)
    losses = metric_by_step(log, "eval_sums_loss")
    assert with_it.metric_for_best_model == "eval_sums_loss"
    assert with_it.best_step == min(losses, key=losses.get)
    without, _, log = train(tmp_path / "without", base_folder, ["diffs"], **changes)
    losses = metric_by_step(log, "eval_loss")
    assert without.metric_for_best_model == "eval_loss" and without.best_step == min(losses, key=losses.get)
    said = [record.getMessage() for record in caplog.records if "trainings without this task" in record.getMessage()]
    assert len(said) == 2  # once a run
    assert "'eval_loss', the mean over their own tasks" in said[0]


@pytest.mark.parametrize(
    "changes",
    [
        {**BEST, "metric_for_best_model": "eval_sums_loss"},
        {
            **EVALUATED,
            "metric_for_best_model": "eval_sums_loss",
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "lr_scheduler_kwargs": {"patience": 1, "factor": 0.3},
        },
        {
            **EVALUATED,
            "metric_for_best_model": "eval_sums_loss",
            "lr_scheduler_type": "greedy",
            "lr_scheduler_kwargs": {"patience": 1, "factor": 0.5, "min_lr": 1e-4},
        },
    ],
    ids=["best", "plateau", "greedy"],
)
def test_a_training_is_the_parents_on_the_same_rows(tmp_path, base_folder, changes):
    patience = [EarlyStoppingCallback(3)] if "load_best_model_at_end" in changes else []
    trained, adapter, log = train(tmp_path / "run", base_folder, ["sums", "diffs"], callbacks=patience, **changes)
    outer = sft_trainer(tmp_path / "rows", base_folder)
    tokens = ["input_ids", "labels"]
    rows = outer.train_dataset.filter(lambda row: row["task"] in ("sums", "diffs")).select_columns(tokens)
    settings = {**SMALL, "bf16": False, "gradient_checkpointing": False, **changes}
    plain = SFTTrainer(
        model=base_folder,
        args=SFTConfig(output_dir=str(tmp_path / "plain"), **settings),
        train_dataset=rows,
        eval_dataset={task: outer.eval_dataset[task].select_columns(tokens) for task in ("sums", "diffs")},
        peft_config=toy.lora(),
        callbacks=patience,
    )
    plain.train()
    plain.save_model(tmp_path / "expected")
    assert equal(adapter, weights(tmp_path / "expected"))
    for key in ("loss", "learning_rate", "eval_sums_loss", "eval_diffs_loss"):
        assert metric_by_step(log, key) == metric_by_step(plain.state.log_history, key)
    if "load_best_model_at_end" in changes:
        assert trained.best_step == plain.state.best_global_step and trained.best_metric == plain.state.best_metric
    else:
        # How often the metric moves the rate is a matter of last digits, which processors differ in.
        assert len(set(metric_by_step(log, "learning_rate").values())) > 1


KILLS = {
    "few checkpoints": ({**BEST, "save_steps": 2, "save_total_limit": 1}, 2, 7),
    "saved when best": ({**BEST, "save_strategy": "best"}, 2, 5),
    "stopped early, killed before": (BEST, 2, 8),
    "stopped early, killed after": (BEST, 1, None),
    "evaluated after the checkpoint": (
        {
            **EVALUATED,
            "eval_strategy": "epoch",
            # Random numbers of the steps after the evaluation.
            "neftune_noise_alpha": 5.0,
            "save_steps": 6,
            "logging_strategy": "epoch",
            "num_train_epochs": 3,
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "lr_scheduler_kwargs": {"patience": 0, "factor": 0.1, "threshold": 0.9},
        },
        5,
        6,
    ),
}


@pytest.mark.parametrize("kind", KILLS)
def test_a_killed_training_ends_as_a_whole_one(tmp_path, base_folder, monkeypatch, kind):
    """Also where the run's folder has moved before it is started again."""
    changes, patience, kill_at = KILLS[kind]

    def trained(folder):
        return train(folder, base_folder, ["sums", "diffs"], callbacks=[EarlyStoppingCallback(patience)], **changes)

    whole = trained(tmp_path / "whole")
    step = TaskSFTTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == kill_at:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    def raises(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if kill_at is None:
            patch.setattr("hf_ensemble.train.flows.adapter_training.save_adapter", raises)
        else:
            patch.setattr(TaskSFTTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "killed")
    assert list((tmp_path / "killed").rglob("checkpoint-*"))
    (tmp_path / "killed").rename(tmp_path / "moved")
    resumed = trained(tmp_path / "moved")
    assert equal(resumed[1], whole[1])
    timed = ("seconds", "files", "log_history")
    records = [{key: own for key, own in vars(run[0]).items() if key not in timed} for run in (whole, resumed)]
    assert records[0] == records[1]
    for key in ("loss", "learning_rate", "grad_norm", "eval_loss", "eval_sums_loss", "train_loss"):
        assert metric_by_step(resumed[2], key) == metric_by_step(whole[2], key), key
    if "early" in kind:
        assert whole[0].global_step < 12


def test_a_damaged_best_checkpoint_is_found_again(tmp_path, base_folder, monkeypatch):
    whole = train(tmp_path / "whole", base_folder, ["sums", "diffs"], **BEST)

    def raises(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hf_ensemble.train.flows.adapter_training.save_adapter", raises)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", base_folder, ["sums", "diffs"], **BEST)
    checkpoint = tmp_path / "run" / "training" / "one" / f"checkpoint-{whole[0].best_step}"
    with (checkpoint / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"gone")
    found = train(tmp_path / "run", base_folder, ["sums", "diffs"], **BEST)
    assert equal(found[1], whole[1]) and found[0].best_step == whole[0].best_step


def test_early_stopping_of_one_training_does_not_stop_the_next(tmp_path, base_folder, monkeypatch):
    ignored, evaluation_loop = [], Trainer.evaluation_loop

    def recorded(self, *args, ignore_keys=None, **kwargs):
        ignored.append(ignore_keys)
        return evaluation_loop(self, *args, ignore_keys=ignore_keys, **kwargs)

    monkeypatch.setattr(Trainer, "evaluation_loop", recorded)

    class Patient(EarlyStoppingCallback):
        trainers: list = []

        def on_train_begin(self, *args, **kwargs):
            Patient.trainers.append(self.trainer)

    class Ends(TrainerCallback):
        found: dict[str, int] = {}

        def on_train_end(self, args, state, control, **kwargs):
            Ends.found[Path(args.output_dir).name] = state.global_step

    class Removed(EarlyStoppingCallback):
        def on_evaluate(self, *args, **kwargs):
            pytest.fail("called")

    given, later = Patient(2), EarlyStoppingCallback(5)
    trainer = sft_trainer(tmp_path / "run", base_folder, callbacks=[given, Removed(), Ends], num_groups=2, **BEST)
    trainer.add_callback(later)
    trainer.remove_callback(Removed)
    # The callback is copied for each training, and the trainer that it knows is not.
    given.trainer = trainer
    output = trainer.train(ignore_keys_for_eval=["attentions"])
    assert len(Patient.trainers) == 3 and all(own is trainer for own in Patient.trainers)
    assert ignored and all(keys == ["attentions"] for keys in ignored)
    run = trainer.run_directory
    records = [run.trained_adapter(name) for name in ("baseline", "group_0", "group_1")]
    for record in records:
        assert record.best_step + 2 == record.global_step == Ends.found[record.name]
    assert all(record.global_step < steps for record, steps in zip(records, (18, 12, 6)))
    assert given.early_stopping_patience_counter == later.early_stopping_patience_counter == 0
    assert output.metrics["eval_mean_loss"] > 0
    card = (run.ensemble / "README.md").read_text()
    for record in records:
        assert f"{record.name} is the adapter of step {record.best_step} of {record.global_step} (`eval_loss`)" in card
    # What calibrates the estimates is the adapter that is kept.
    (scored,) = run.scored_runs()
    losses = [entry for entry in trainer.state.log_history if entry.get("adapter") == "baseline"]
    assert scored.distance == records[0].distance
    expected = {task: metric_by_step(losses, f"eval_{task}_loss")[records[0].best_step] for task in trainer.tasks}
    # Within a training the loss is a mean over tokens, here over rows: of one batch each.
    assert {task: own.loss for task, own in scored.scores.items()} == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "4 bits"])
def test_base_weights_stay_as_they_are(tmp_path, quantized):
    base = toy.save_model(toy.llama(hidden_size=64, intermediate_size=128), tmp_path / "base")
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)} if quantized else {}
    trainer = EnsembleSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, **options),
        args=sft_config(tmp_path / "run", **{**BEST, "num_train_epochs": 1}),
        train_dataset=toy.sft_tasks(),
        processing_class=toy.tokenizer(),
        peft_config=toy.lora(),
    )
    trainer.open_run()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trained = trainer.flow.training.run("one", ["sums"], tmp_path / "one")
    assert trained.best_step is not None
    found = trainer.model.state_dict()
    assert equal({name: found[name] for name in before}, before)
    trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)


@pytest.mark.parametrize(
    ("changes", "callbacks", "message"),
    [
        ({"eval_strategy": "no"}, [], "^load_best_model_at_end=True .* eval_strategy='no' .* Please set eval_strategy"),
        ({"metric_for_best_model": "eval_sums_bleu"}, [], "^metric_for_best_model='eval_sums_bleu' .*'eval_TASK_loss'"),
        ({"metric_for_best_model": "accuracy"}, [], r"'accuracy' .*\['loss', 'mean_token_accuracy', 'entropy'\]"),
        (
            {"load_best_model_at_end": False, "metric_for_best_model": None},
            [EarlyStoppingCallback()],
            "^EarlyStoppingCallback .* metric_for_best_model is missing",
        ),
        (
            {"load_best_model_at_end": False, "save_strategy": "best", "eval_strategy": "no"},
            [],
            "^save_strategy='best' cannot be honoured",
        ),
    ],
)
def test_what_no_evaluation_gives_is_refused_before_anything_is_loaded(tmp_path, changes, callbacks, message):
    args = sft_config(tmp_path, EnsembleSFTConfig, **BEST)
    for name, value in changes.items():
        setattr(args, name, value)
    with pytest.raises(ConfigurationError, match=message):
        EnsembleSFTTrainer("no model", args, train_dataset=toy.sft_tasks(), peft_config=toy.lora(), callbacks=callbacks)


def test_early_stopping_added_later_is_checked_too(tmp_path, base_folder):
    trainer = sft_trainer(tmp_path / "run", base_folder)
    with pytest.raises(ConfigurationError, match="EarlyStoppingCallback .* eval_strategy='no'"):
        trainer.add_callback(EarlyStoppingCallback)
    with pytest.raises(ConfigurationError, match="no hyperparameter_search"):
        trainer.hyperparameter_search()
    with pytest.raises(ConfigurationError, match="Expected no trial"):
        trainer.train(trial={"learning_rate": 1e-3})


def test_what_decides_the_kept_adapter_is_compared(tmp_path, base_folder):
    def opened(**changes):
        sft_trainer(tmp_path / "run", base_folder, **{**BEST, **changes}).open_run()

    opened()
    opened(save_total_limit=3)
    for name, value in (("save_steps", 2), ("per_device_eval_batch_size", 3)):
        with pytest.raises(RunMismatchError, match=f"arguments.{name}"):
            opened(**{name: value})


def test_a_selection_follows_its_target(tmp_path, base_folder):
    tasks = toy.sft_tasks()
    changes = {**BEST, "metric_for_best_model": "eval_sums_loss", "max_auxiliary": 1, "num_train_epochs": 1}
    trainer = SelectionSFTTrainer(
        model=base_folder,
        args=sft_config(tmp_path / "run", SelectionSFTConfig, meta_initialization=True, **changes),
        train_dataset=split(tasks, "train"),
        eval_dataset=split(tasks, "validation"),
        peft_config=toy.lora(),
        target="sums",
        callbacks=[EarlyStoppingCallback(3)],
    )
    trainer.train()
    for name in ("meta", "adapter"):
        record = json.loads((tmp_path / "run" / "training" / f"{name}.json").read_text())
        assert record["metric_for_best_model"] == "eval_sums_loss" and record["best_step"] >= 1
