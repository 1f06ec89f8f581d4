"""Runs whose groups go on from the adapter for all tasks for as long as is best for each."""

import pytest

from helpers import toy
from helpers.trainers import sft_trainer
from hf_ensemble import EnsembleConfig
from hf_ensemble.cli.choice_arguments import GroupArguments
from hf_ensemble.cli.parsing import parse
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.runs import Costs
from hf_ensemble.select import DataSelector
from hf_ensemble.select.settings import LENGTHS, GroupingSettings
from hf_ensemble.train.task_trainer import TaskSFTTrainer

UNSET = {
    "grouping_method": "auto",
    "group_initialization": "auto",
    "continued_length": "auto",
    "learning_rate": 0.01,
}


@pytest.mark.parametrize(("budget", "concurrent"), [(1.3, 1), (1.3, 2), (4.0, 1)])
def test_each_group_is_trained_for_the_length_that_was_chosen(tmp_path, monkeypatch, budget, concurrent):
    base = toy.save_model(toy.llama(), tmp_path / "base")
    options = {**UNSET, "compute_budget": budget, "concurrent_groups": concurrent}
    if budget < 2:
        # Shorter trainings have to have steps.
        options["num_train_epochs"] = 6
    trainer = sft_trainer(tmp_path / "run", base, **options)
    trainer.train()
    run, grouping = trainer.run_directory, trainer.grouping
    new = [name for name in grouping.groups if name != grouping.baseline_group]
    lengths = {grouping.length_of(name) for name in new}
    assert lengths and lengths != {1.0} and lengths <= set(LENGTHS) and grouping.cost <= budget
    for name in new:
        trained = run.trained_adapter(name)
        assert trained.length == grouping.length_of(name)
        # Whole steps.
        epochs = trainer.args.num_train_epochs * trained.length
        assert (
            epochs <= trained.log_history[-1]["epoch"] < epochs + trained.log_history[-1]["epoch"] / trained.global_step
        )
    costs, baseline = run.read(Costs).systems["ensemble"], run.trained_adapter("baseline")
    flops = [run.trained_adapter(name).flops for name in new if name in trainer.ensemble.adapter_names]
    assert costs.training_flops == pytest.approx(sum(flops) + baseline.flops)
    assert DataSelector.for_choice(run.baseline_gradients, grouping).repeat(grouping) == grouping
    monkeypatch.setattr(TaskSFTTrainer, "train", lambda *a, **k: pytest.fail("trained again"))
    sft_trainer(tmp_path / "run", base, **options).train()


def test_short_trainings_are_not_chosen_where_they_would_be_rounded_up(tmp_path, base_folder):
    trainer = sft_trainer(tmp_path / "run", base_folder, **{**UNSET, "compute_budget": 1.3, "num_train_epochs": 1})
    trainer.train()
    # Its smallest task has five steps.
    chosen = trainer.grouping.provenance
    assert [chosen["length"], *chosen["other_lengths"]] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("changes", "lengths"),
    [
        ({}, LENGTHS),
        ({"continued_length": 0.5}, (0.5,)),
        ({"continued_length": "0.5"}, (0.5,)),
        # What was trained calibrates the predictions of what is as long.
        ({"grouping_method": "mixtures", "sequential_groups": True}, (1.0,)),
        # Other lengths are those of replayed trainings.
        ({"optim": "adafactor"}, (1.0,)),
        ({"preconditioner": "none"}, (1.0,)),
        ({"optim": "sgd"}, LENGTHS),
        ({"num_groups": 2}, (1.0,)),
        ({"grouping_method": "direct"}, (1.0,)),
    ],
)
def test_lengths_to_choose_among_are_those_of_the_settings(tmp_path, changes, lengths):
    assert EnsembleConfig(str(tmp_path), use_cpu=True, **changes).continued_lengths() == lengths


def test_lengths_are_flags(tmp_path):
    flags = ["--store", str(tmp_path), "--output_dir", str(tmp_path), "--grouping_method", "mixtures"]
    for given, expected in (("auto", LENGTHS), ("0.5", (0.5,)), ("2", (2.0,))):
        (arguments,), _ = parse([GroupArguments], [*flags, "--continued_length", given], command="group")
        assert arguments.continued_lengths() == expected
    (arguments,), _ = parse([GroupArguments], flags, command="group")
    assert arguments.continued_lengths() == LENGTHS


@pytest.mark.parametrize("value", ["long", 0, "-1", None, True, float("nan")])
def test_what_is_no_length_is_refused(value):
    with pytest.raises(ConfigurationError, match="continued_length has to be a"):
        GroupingSettings(continued_length=value)
