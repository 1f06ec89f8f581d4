"""Runs whose groups are mixtures, or go on from the adapter for all tasks."""

import json

import pytest
import torch
from datasets import concatenate_datasets
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from helpers import toy
from helpers.trainers import SMALL, sft_config, sft_trainer, split
from hf_ensemble import EnsembleConfig, PeftEnsembleModel, SelectionSFTConfig, SelectionSFTTrainer, TaskSet
from hf_ensemble._files import checksums
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.runs import Costs, EnsembleWeights, Estimate, run_selector
from hf_ensemble.runs.progress import run_progress
from hf_ensemble.select import DataSelector, Grouping, predicted_losses
from hf_ensemble.store import GradientStore
from hf_ensemble.train.flows.calibration import Calibration
from hf_ensemble.train.flows.groups.trainings import GroupTrainings
from hf_ensemble.train.task_trainer import TaskSFTTrainer

MIXTURES = {
    "grouping_method": "mixtures",
    "compute_budget": 2.0,
    "num_groups": 3,
    "train_baseline": False,
    "calibration_runs": 0,
    "num_train_epochs": 1,
    "sequential_groups": True,
}


@pytest.fixture(scope="module")
def sequential(tmp_path_factory):
    """A run of mixtures, the choices that it made one after the other, and its base model."""
    folder = tmp_path_factory.mktemp("sequential")
    base = toy.save_model(toy.llama(), folder / "base")
    choices, choose = [], GroupTrainings._choice

    def recorded(self, observed, trained):
        choices.append((list(observed), choose(self, observed, trained)))
        return choices[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GroupTrainings, "_choice", recorded)
        trainer = sft_trainer(folder / "run", base, **MIXTURES)
        trainer.train()
    return trainer, choices, base


def test_each_adapter_that_is_trained_calibrates_the_choice_of_the_next(sequential):
    trainer, choices, _ = sequential
    grouping, run = trainer.grouping, trainer.run_directory
    theta0 = trainer.flow.training.fingerprint()
    assert len(choices) == 1 + len(grouping.groups) >= 3
    for number, (observed, choice) in enumerate(choices):
        trained = [f"group_{row}" for row in range(number)]
        assert list(choice.settings["trained"]) == trained and len(observed) == number
        for name in trained:
            # What was trained stays.
            assert choice.mixtures[name] == run.trained_adapter(name).mixture == grouping.mixtures[name]
            assert run.scored_run(choice.mixtures[name], 42, theta0).as_observed() in observed
    # Tasks are assigned by what was measured.
    losses = {
        name: run.scored_run(grouping.mixtures[name], 42, theta0).as_observed().losses for name in grouping.groups
    }
    for task in trainer.tasks:
        assert grouping.group_of(task) == min(losses, key=lambda name: losses[name][task])
    assert Grouping.load(run.where(Grouping)) == grouping
    assert DataSelector.for_choice(run.gradients, grouping).repeat(grouping) == grouping


def test_one_job_trains_the_groups_of_a_sequential_run_in_turn(sequential, tmp_path, monkeypatch):
    whole, _, base = sequential
    trainer = sft_trainer(tmp_path, base, **MIXTURES)
    trainer.group_tasks()
    with monkeypatch.context() as patch:
        patch.setattr("hf_ensemble.train.task_trainer.TaskSFTTrainer.train", lambda *_, **__: pytest.fail("trained"))
        for name, shard in [("adapter:group_0", None), ("adapter", (0, 2))]:
            with pytest.raises(ConfigurationError, match=r"one process trains them in turn.*run_stage\('adapter'\)"):
                trainer.run_stage(name, shard)
    trainer.run_stage("adapter")
    run = trainer.run_directory
    assert run.read(Grouping) == whole.run_directory.read(Grouping)
    for name in run.read(Grouping).groups:
        own, expected = (each.member(name) / "adapter_model.safetensors" for each in (run, whole.run_directory))
        assert own.read_bytes() == expected.read_bytes()
    assert {stage.name: stage.status for stage in run_progress(run)}["evaluation"] == "ready"


def test_adapters_are_trained_on_their_mixtures_within_the_budget(sequential):
    trainer, _, _ = sequential
    grouping, run = trainer.grouping, trainer.run_directory
    assert grouping.cost <= 2.0 and grouping.method == "mixtures" and grouping.baseline_group is None
    drawn = sum(run.trained_adapter(name).global_step for name in grouping.groups)
    whole = -(-sum(len(task.splits["train"]) for task in trainer.tasks.values()) // 4)
    # Steps are rounded up once an epoch.
    assert drawn <= grouping.cost * whole + len(grouping.groups)
    estimate = json.loads((run.path / "estimate" / "estimate.json").read_text())
    assert set(estimate["predicted_loss"]) == set(grouping.groups)
    loaded = PeftEnsembleModel.from_pretrained(run.ensemble)
    assert set(loaded.weights) == set(trainer.tasks)


def test_a_run_that_is_killed_between_choices_ends_alike(sequential, tmp_path, monkeypatch):
    whole, _, base = sequential

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    # After the first training, after its scores, and in the second training.
    moments = [(Calibration, "score_trained"), (GroupTrainings, "_chosen_again"), (TaskSFTTrainer, "train")]
    for owner, name in moments:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(KeyboardInterrupt):
                sft_trainer(tmp_path / "run", base, **MIXTURES).train()
    again = sft_trainer(tmp_path / "run", base, **MIXTURES)
    again.train()
    assert again.grouping == whole.grouping
    for name in again.grouping.groups:
        files = [one.run_directory.member(name) / "adapter_model.safetensors" for one in (whole, again)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_what_was_deleted_is_made_again_without_training(sequential, monkeypatch):
    whole, _, base = sequential
    whole.run_directory.where(Grouping).unlink()
    monkeypatch.setattr(TaskSFTTrainer, "train", lambda *a, **k: pytest.fail("trained again"))
    again = sft_trainer(whole.run_directory.path, base, **MIXTURES)
    again.train()
    assert again.grouping == whole.grouping


def test_a_calibrating_training_that_is_chosen_is_not_made_again(tmp_path, base_folder, monkeypatch):
    options = {"num_groups": 1, "train_baseline": False, "calibration_runs": 1, "num_train_epochs": 1}
    trainer = sft_trainer(tmp_path / "run", base_folder, **options)
    trainer.train()
    run = trainer.run_directory
    assert [own.name for own in run.trainings()] == [own.name for own in trainer.flow.trainings()]
    assert len(run.trainings()) == 1 and run.trainings()[0].files
    assert checksums(run.member("group_0")) == run.trainings()[0].files and trainer.grouping.cost == 1.0
    assert run.read(Costs).systems["ensemble"].trainings == [run.trainings()[0].name]
    assert not [path for path in (run.path / "scored_runs").iterdir() if path.is_dir()]
    monkeypatch.setattr(TaskSFTTrainer, "train", lambda *a, **k: pytest.fail("trained again"))
    sft_trainer(run.path, base_folder, **options).train()


def test_a_selection_of_all_tasks_is_the_calibrating_training(tmp_path, base_folder, monkeypatch):
    def trainer():
        return SelectionSFTTrainer(
            model=base_folder,
            args=sft_config(tmp_path / "run", SelectionSFTConfig, selection_method="all", num_train_epochs=1),
            train_dataset=split(toy.sft_tasks(), "train"),
            eval_dataset=split(toy.sft_tasks(), "validation"),
            peft_config=toy.lora(),
            target="sums",
        )

    selection = trainer()
    selection.train()
    run = selection.run_directory
    (only,) = run.trainings()
    assert only.files.items() <= checksums(run.adapter).items()
    assert run.read(Costs).systems["selection"].trainings == [only.name]
    monkeypatch.setattr(TaskSFTTrainer, "train", lambda *a, **k: pytest.fail("trained again"))
    trainer().train()


@pytest.mark.parametrize("max_steps", [-1, 6])
def test_a_group_that_goes_on_is_a_plain_training_from_the_baselines_adapter(tmp_path, base_folder, max_steps):
    trainer = sft_trainer(
        tmp_path / "run",
        base_folder,
        num_groups=2,
        group_initialization="baseline",
        continued_length=0.5,
        max_steps=max_steps,
        warmup_steps=2,
    )
    trainer.train()
    run, tasks = trainer.run_directory, TaskSet.from_datasets(toy.sft_tasks())
    assert GradientStore(run.gradients).identity["model"]["theta0"] == run.trained_adapter("baseline").theta0
    assert GradientStore(run.baseline_gradients).identity["model"]["theta0"] == run.trained_adapter("group_0").theta0
    recorded = run.read(Estimate).predicted_loss
    going_on = run_selector(run, list(trainer.tasks), 20, [], continued_length=0.5)
    predicted = predicted_losses(going_on.estimator, trainer.grouping)
    assert {name: list(own.values()) for name, own in recorded.items()} == {
        name: pytest.approx(own) for name, own in zip(trainer.grouping.groups, predicted.tolist())
    }
    for name, members in trainer.grouping.groups.items():
        trained = run.trained_adapter(name)
        assert trained.length == 0.5 and trained.theta0 != run.trained_adapter("baseline").theta0
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        args = {**SMALL, "num_train_epochs": 1, "max_steps": 3 if max_steps > 0 else -1, "warmup_steps": 1}
        plain = SFTTrainer(
            model=PeftModel.from_pretrained(base, str(run.baseline), is_trainable=True),
            args=SFTConfig(output_dir=str(tmp_path / name), bf16=False, gradient_checkpointing=False, **args),
            train_dataset=concatenate_datasets([tasks.split("train")[member] for member in members]),
            processing_class=toy.tokenizer(),
        )
        plain.train()
        assert trained.global_step == plain.state.global_step
        expected = {n: p for n, p in plain.model.named_parameters() if "lora_" in n}
        ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), str(run.member(name)))
        found = dict(ours.named_parameters())
        assert all(torch.allclose(found[n], p, atol=1e-6) for n, p in expected.items())


def test_one_group_that_goes_on_is_weighed_against_the_baseline(tmp_path, base_folder):
    options = {"num_groups": 1, "group_initialization": "baseline", "num_train_epochs": 1}
    trainer = sft_trainer(tmp_path / "run", base_folder, **options)
    metrics = trainer.train().metrics
    weights = trainer.run_directory.read(EnsembleWeights)
    assert set(weights.losses) == set(trainer.tasks)
    for task in trainer.tasks:
        assert metrics[f"eval_{task}_loss"] <= metrics[f"eval_baseline_{task}_loss"] + 1e-3


def test_mixtures_that_go_on_are_chosen_anew_from_what_they_came_to(tmp_path, base_folder, monkeypatch):
    options = {"grouping_method": "mixtures", "compute_budget": 2.0, "group_initialization": "baseline"}
    options |= {"continued_length": 1.0, "num_train_epochs": 2, "learning_rate": 0.01, "sequential_groups": True}
    chosen, choose = [], GroupTrainings._choice

    def recorded(self, observed, trained):
        chosen.append(list(observed))
        return choose(self, observed, trained)

    monkeypatch.setattr(GroupTrainings, "_choice", recorded)
    trainer = sft_trainer(tmp_path / "run", base_folder, **options)
    trainer.train()
    grouping, run = trainer.grouping, trainer.run_directory
    new = [name for name in grouping.groups if name != grouping.baseline_group]
    assert new and [len(observed) for observed in chosen] == list(range(len(new) + 1))
    on = run.trained_adapter(new[0]).theta0
    assert run.scored_run(grouping.mixtures[new[0]], 42, on).as_observed() == chosen[1][0]
    # The adapter for all tasks serves by its losses where the others begin.
    stays = run.scored_run(list(trainer.tasks), 42, trainer.flow.training.fingerprint())
    base = run.read(Estimate).base_loss
    assert {task: own.loss for task, own in stays.scores.items()} == {k: pytest.approx(v) for k, v in base.items()}
    assert DataSelector.for_choice(run.baseline_gradients, grouping).repeat(grouping) == grouping


@pytest.mark.parametrize(
    ("weights", "has_scales"), [("cross_validated", True), ("fitted", False), ("own_group", False)]
)
def test_mixtures_are_chosen_with_a_scale_where_their_outputs_get_one(tmp_path, base_folder, weights, has_scales):
    options = {"grouping_method": "mixtures", "group_initialization": "baseline", "ensemble_weights": weights}
    trainer = sft_trainer(tmp_path / "run", base_folder, **options)
    assert trainer.group_tasks().settings["output_scales"] == has_scales


def test_there_has_to_be_an_adapter_to_go_on_from(tmp_path):
    with pytest.raises(ConfigurationError, match="train_baseline=False does not train"):
        sft_config(tmp_path, group_initialization="baseline", train_baseline=False)
    with pytest.raises(ConfigurationError, match="calibration_runs=2 fine-tunes from the start"):
        sft_config(tmp_path, group_initialization="baseline", calibration_runs=2)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, ("mixtures", "baseline", 2.0)),
        ({"compute_budget": 1.2}, ("mixtures", "baseline", 1.2)),
        ({"grouping_method": "mixtures"}, ("mixtures", "baseline", None)),
        ({"group_initialization": "fresh"}, ("mixtures", "fresh", 2.0)),
        ({"train_baseline": False}, ("mixtures", "fresh", 2.0)),
        ({"calibration_runs": 2}, ("mixtures", "fresh", 2.0)),
        ({"num_groups": 2}, ("direct", "baseline", None)),
        ({"num_groups": 2, "compute_budget": 1.5}, ("mixtures", "baseline", 1.5)),
        ({"grouping_method": "direct", "train_baseline": False}, ("direct", "fresh", None)),
        ({"overlapping_groups": True}, ("direct", "baseline", None)),
        ({"task_loss_weighting": "tasks"}, ("direct", "baseline", None)),
        ({"train_sampling_strategy": "sequential"}, ("direct", "baseline", None)),
    ],
)
def test_groups_are_mixtures_that_go_on_unless_other_settings_say_otherwise(tmp_path, changes, expected):
    config = EnsembleConfig(str(tmp_path), use_cpu=True, **changes)
    assert (config.grouping_method, config.group_initialization, config.compute_budget) == expected


def test_mixtures_have_to_be_drawn(tmp_path):
    with pytest.raises(ConfigurationError, match="train_sampling_strategy='sequential' orders all rows"):
        EnsembleConfig(str(tmp_path), use_cpu=True, grouping_method="mixtures", train_sampling_strategy="sequential")


def test_a_run_by_default_costs_at_most_twice_the_adapter_for_all(tmp_path, base_folder):
    unset = dict.fromkeys(("grouping_method", "group_initialization"), "auto")
    trainer = sft_trainer(tmp_path / "run", base_folder, **unset)
    trainer.train()
    run, grouping = trainer.run_directory, trainer.grouping
    assert grouping.method == "mixtures" and grouping.cost <= 2.0
    baseline = run.trained_adapter("baseline").theta0
    for name in grouping.groups:
        if name != grouping.baseline_group:
            trained = run.trained_adapter(name)
            assert trained.theta0 != baseline and trained.length == grouping.length_of(name)
    assert "sums" in trainer.selector().select("sums").tasks
