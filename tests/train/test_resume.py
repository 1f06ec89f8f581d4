"""Runs that are started again, killed, or found in the way."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import toy
from helpers.trainers import killed_in_a_call, sft_config, sft_trainer
from hf_ensemble import (
    EnsembleSFTTrainer,
)
from hf_ensemble.errors import RunMismatchError
from hf_ensemble.store import GradientStore
from hf_ensemble.train.task_trainer import TaskSFTTrainer


def test_a_finished_run_started_again_trains_nothing(finished, monkeypatch):
    trainer, output, base = finished
    monkeypatch.setattr(TaskSFTTrainer, "train", lambda *a, **k: pytest.fail("trained again"))
    again = sft_trainer(trainer.run_directory.path, base, num_groups=2)
    metrics = again.train().metrics
    compared = [key for key in output.metrics if key.endswith(("loss", "accuracy"))]
    assert {k: metrics[k] for k in compared} == pytest.approx({k: output.metrics[k] for k in compared})


def test_a_killed_run_goes_on_and_ends_with_the_same_adapters(finished, tmp_path, monkeypatch):
    whole, _, base = finished
    calls = killed_in_a_call(monkeypatch, TaskSFTTrainer, "train", 3)
    with pytest.raises(KeyboardInterrupt):
        sft_trainer(tmp_path / "run", base, num_groups=2).train()
    sft_trainer(tmp_path / "run", base, num_groups=2).train()
    assert len(calls) == 4
    for name in ("baseline", "ensemble/adapters/group_0", "ensemble/adapters/group_1"):
        files = [run / name / "adapter_model.safetensors" for run in (whole.run_directory.path, tmp_path / "run")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_of_another_configuration_is_refused_by_name(finished):
    trainer, _, base = finished
    run = trainer.run_directory.path
    with pytest.raises(RunMismatchError, match=r"arguments.learning_rate: found 0.01, expected 0.02"):
        sft_trainer(run, base, num_groups=2, learning_rate=2e-2).train()
    other = toy.sft_tasks(train=13)
    with pytest.raises(RunMismatchError, match="tasks: found"):
        sft_trainer(run, base, other, num_groups=2).train()
    # Where and how to report is no part of what was trained.
    sft_trainer(run, base, num_groups=2, logging_steps=3, save_steps=7).open_run()


@pytest.mark.parametrize(
    "change",
    [
        {"projection_seed": 3},
        {"projection_dim": 64},
        {"feature_dtype": "float32"},
        {"max_length": 30},
        {"seed": 5},
        {"dataloader_drop_last": True},
        {"weight_decay": 0.1},
        {"num_components": 10},
        {"ensemble_weights": "own_group"},
        {"affinity_subsets": 21},
        {"train_baseline": False},
    ],
)
def test_every_argument_that_matters_is_compared(finished, change):
    trainer, _, base = finished
    with pytest.raises(RunMismatchError, match=f"{next(iter(change))}|theta0"):
        sft_trainer(trainer.run_directory.path, base, num_groups=2, **change).open_run()


# Of evaluations during trainings.
EVALUATIONS = [
    {"per_device_eval_batch_size": 3},
    {"eval_strategy": "epoch"},
    {"eval_strategy": "epoch", "eval_on_start": True},
    {"eval_strategy": "steps", "eval_steps": 3},
    {"eval_delay": 1},
    {"prediction_loss_only": True},
    {"batch_eval_metrics": True},
    {"eval_do_concat_batches": False},
    {"include_for_metrics": ["loss"]},
    {"eval_packing": True},
    {"greater_is_better": True},
]


@pytest.mark.parametrize(
    "change",
    [
        *EVALUATIONS,
        {"eval_accumulation_steps": 1},
        {"eval_use_gather_object": True},
        {"torch_empty_cache_steps": 5},
        {"gradient_checkpointing": True},
        {"dataset_num_proc": 2},
        {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn"},
        {"skip_memory_metrics": False},
        {"include_num_input_tokens_seen": True},
        {"ignore_data_skip": True},
        {"restore_callback_states_from_checkpoint": True},
        {"do_train": True, "do_predict": True},
    ],
    ids=lambda change: "-".join(change),
)
def test_what_does_not_affect_trainings_is_not_compared(finished, change):
    trainer, _, base = finished
    sft_trainer(trainer.run_directory.path, base, num_groups=2, **change).open_run()


def test_where_activations_lie_is_not_compared(finished):
    trainer, _, base = finished
    again = sft_trainer(trainer.run_directory.path, base, num_groups=2)
    # trl makes room for them on accelerators alone.
    again.args.activation_offloading = True
    again.open_run()


BEST = {"load_best_model_at_end": True, "save_strategy": "epoch"}


@pytest.mark.parametrize(
    ("decided", "change"),
    [
        *((BEST, change) for change in EVALUATIONS if change != {"eval_strategy": "epoch"}),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss"}, {"eval_delay": 1}),
        ({"task_loss_weighting": "convergence", "grouping_method": "direct"}, {"eval_delay": 1}),
    ],
)
def test_evaluations_that_decide_what_is_trained_are_compared(tmp_path, base_folder, decided, change):
    def opened(**changes):
        sft_trainer(tmp_path, base_folder, **{"eval_strategy": "epoch", **decided, **changes}).open_run()

    opened()
    if "eval_steps" in change:
        change = {**change, "save_strategy": "steps", "save_steps": 3}
    with pytest.raises(RunMismatchError, match="|".join(f"arguments.{name}" for name in change)):
        opened(**change)


def test_metrics_that_decide_what_is_kept_are_compared(tmp_path, base_folder):
    def opened(compute_metrics, **changes):
        EnsembleSFTTrainer(
            model=base_folder,
            args=sft_config(tmp_path / "run", **changes),
            train_dataset=toy.sft_tasks(),
            peft_config=toy.lora(),
            compute_metrics=compute_metrics,
        ).open_run()

    deciding = {**BEST, "eval_strategy": "epoch", "metric_for_best_model": "up"}
    opened(lambda prediction: {"up": 1.0}, **deciding)
    with pytest.raises(RunMismatchError, match="trainer_arguments.compute_metrics.source"):
        opened(lambda prediction: {"up": -1.0}, **deciding)
    opened(lambda prediction: {"up": 1.0}, overwrite_run=True)
    opened(lambda prediction: {"up": -1.0})


def test_other_weights_of_the_same_name_are_another_run(finished, tmp_path):
    trainer, _, base = finished
    model = toy.llama(seed=5)
    model.config._name_or_path = base
    with pytest.raises(RunMismatchError, match="model.base_weights"):
        EnsembleSFTTrainer(
            model=model,
            args=sft_config(trainer.run_directory.path, num_groups=2),
            train_dataset=toy.sft_tasks(),
            processing_class=toy.tokenizer(),
            peft_config=toy.lora(),
        ).open_run()


def test_what_a_trainer_is_constructed_with_is_compared(finished):
    trainer, _, base = finished

    def opened(**changes):
        EnsembleSFTTrainer(
            model=base,
            args=sft_config(trainer.run_directory.path, num_groups=2),
            train_dataset=toy.sft_tasks(),
            peft_config=toy.lora(),
            **changes,
        ).open_run()

    opened()
    other_end = toy.tokenizer()
    other_end.eos_token = "yes"
    for changes, name in [
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}, "trainer_arguments.optimizer_cls_and_kwargs"),
        ({"processing_class": other_end}, "tokens"),
    ]:
        with pytest.raises(RunMismatchError, match=name):
            opened(**changes)


def test_a_training_goes_on_from_its_last_whole_checkpoint_and_from_no_other(tmp_path, base_folder, monkeypatch):
    changes = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 4}

    def adapter(folder, mixture, kill_at=None):
        trainer = sft_trainer(tmp_path / folder, base_folder, **changes)
        trainer.open_run()
        step = TaskSFTTrainer.training_step

        def killed(self, *args, **kwargs):
            if kill_at is not None and self.state.global_step == kill_at:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        monkeypatch.setattr(TaskSFTTrainer, "training_step", killed)
        try:
            trainer.flow.training.run("one", mixture, tmp_path / folder / "adapter")
        finally:
            monkeypatch.setattr(TaskSFTTrainer, "training_step", step)
        return load_file(str(tmp_path / folder / "adapter" / "adapter_model.safetensors"))

    whole, other = adapter("whole", ["sums"]), adapter("other", ["diffs"])
    for folder, mixture, expected in (("a", ["sums"], whole), ("b", ["diffs"], other)):
        with pytest.raises(KeyboardInterrupt):
            adapter(folder, ["sums"], kill_at=7)
        # What a kill in the middle of saving leaves.
        (tmp_path / folder / "training" / "one" / "checkpoint-8").mkdir()
        found = adapter(folder, mixture)
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.fixture
def trained(monkeypatch):
    """Names of the trainings."""
    train, names = TaskSFTTrainer.train, []

    def recorded(trainer, *args, **kwargs):
        names.append(Path(trainer.args.output_dir).name)
        return train(trainer, *args, **kwargs)

    monkeypatch.setattr(TaskSFTTrainer, "train", recorded)
    return names


def test_overwriting_starts_over(tmp_path, base_folder, trained):
    options = {"num_groups": 1, "num_train_epochs": 1}
    sft_trainer(tmp_path / "run", base_folder, **options).train()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    sft_trainer(tmp_path / "run", base_folder, **options, learning_rate=1e-3, overwrite_run=True).train()
    # One group is the adapter for all tasks.
    assert trained == ["baseline", "baseline"]
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_gradients_that_are_captured_otherwise_keep_the_adapter_for_all(tmp_path, base_folder, trained):
    options = {"num_groups": 2, "num_train_epochs": 1}
    sft_trainer(tmp_path / "run", base_folder, **options).train()
    # No task has so many rows.
    sft_trainer(tmp_path / "run", base_folder, **options, capture_rows=1000, capture_seed=1).train()
    assert trained == ["baseline", "group_0", "group_1"]
    other = {"margin": "mean_log_odds", "capture_rows": 4, "overwrite_run": True}
    again = sft_trainer(tmp_path / "run", base_folder, **options, **other)
    again.train()
    assert trained[3:] == ["group_0", "group_1"]
    store = GradientStore(tmp_path / "run" / "gradients")
    assert store.identity["config"]["margin"] == "mean_log_odds"
    assert store.num_rows("train") == 4 * len(again.tasks)


def test_another_choice_of_groups_keeps_gradients_and_baseline(tmp_path, base_folder, trained, monkeypatch):
    sft_trainer(tmp_path / "run", base_folder, num_groups=1, num_train_epochs=1).train()
    with pytest.raises(RunMismatchError, match="num_groups: found 1, expected 2"):
        sft_trainer(tmp_path / "run", base_folder, num_groups=2, num_train_epochs=1).train()
    trained.clear()
    monkeypatch.setattr(
        "hf_ensemble.train.flows.capturing.capture_gradients", lambda *a, **k: pytest.fail("captured again")
    )
    again = sft_trainer(tmp_path / "run", base_folder, num_groups=2, num_train_epochs=1, overwrite_run=True)
    again.train()
    assert trained == ["group_0", "group_1"] and len(again.grouping.groups) == 2


def test_an_old_record_is_not_taken_for_a_new_adapter(tmp_path, base_folder):
    trainer = sft_trainer(tmp_path / "run", base_folder, num_train_epochs=1)
    trainer.open_run()
    first = trainer.flow.training.run("one", ["sums"], tmp_path / "adapter")
    assert trainer.flow.training.run("one", ["sums"], tmp_path / "adapter") == first
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    (tmp_path / "adapter").rmdir()
    second = trainer.flow.training.run("one", ["diffs"], tmp_path / "adapter")
    assert list(second.mixture) == ["diffs"] and (tmp_path / "adapter").is_dir()


def test_adapters_of_one_run_are_trained_by_as_many_processes(tmp_path, base_folder, trained):
    trainer = sft_trainer(tmp_path / "run", base_folder, num_train_epochs=1)
    trainer.open_run()
    baseline = trainer.flow.training.run("baseline", list(trainer.tasks), tmp_path / "adapter")
    assert baseline.batch_size == 4
    # As if two processes had drawn the rows.
    trainer.run_directory.write_trained_adapter(replace(baseline, batch_size=8))
    with pytest.raises(
        RunMismatchError, match="drew 8 rows at a time, .* and this one would draw 4: .* Start it with as"
    ):
        trainer.flow.training.run("group_0", ["sums"], tmp_path / "group")
    assert trained == ["baseline"]
