"""A run that finds out by itself how many groups to train at once, and is otherwise what it would be."""

import inspect
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertModel, LlamaModel, TrainerCallback

from helpers import toy
from helpers.trainers import sft_trainer, text_trainer
from hf_ensemble.cli.parsing import parse
from hf_ensemble.runs import Concurrency
from hf_ensemble.train import EnsembleConfig, EnsembleSFTConfig
from hf_ensemble.train.flows.groups import concurrency
from hf_ensemble.train.flows.groups.concurrency import groups_at_once

TASKS = "abcd"
BATCH = 4
# Groups are chosen by gradients at the start alone.
OPTIONS = {"num_groups": 4, "train_baseline": False, "calibration_runs": 0, "max_steps": 3, "save_report": False}


class Clock:
    """Counts passes through the base as seconds, or the rows in them; more rows than `most` do not fit into memory."""

    def __init__(self):
        self.counts_rows = False
        self.most = 1000
        self.seconds = 0
        self.passes = []

    def watch(self, monkeypatch, backbone):
        plain = backbone.forward

        def forward(module, *args, **kwargs):
            rows = len(args[0] if args else kwargs["input_ids"])
            if module.training and torch.is_grad_enabled():
                if rows > self.most:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                self.passes.append(rows)
                self.seconds += rows if self.counts_rows else 1
            return plain(module, *args, **kwargs)

        forward.__signature__ = inspect.signature(plain)
        monkeypatch.setattr(backbone, "forward", forward)
        monkeypatch.setattr(concurrency, "time", SimpleNamespace(perf_counter=lambda: self.seconds))


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(concurrency, "_LEAST_PASSES", 0)
    clock = Clock()
    for backbone in (LlamaModel, BertModel):
        clock.watch(monkeypatch, backbone)
    return clock


def sft(folder, **options):
    rows = {
        task: {"train": toy.sum_rows(8, number), "validation": toy.sum_rows(4, 9)} for number, task in enumerate(TASKS)
    }
    base = toy.save_model(toy.llama(), folder.parent / "base")
    return sft_trainer(folder, base, rows, **{**OPTIONS, **options})


def text(folder, **options):
    rows = {
        task: {"train": toy.text_rows(8, number), "validation": toy.text_rows(4, 9)}
        for number, task in enumerate(TASKS)
    }
    base = folder.parent / "base"
    toy.save_model(toy.bert(2), base)
    return text_trainer(folder, str(base), rows, head="linear", **{**OPTIONS, **options})


def weights(trainer):
    run = trainer.run_directory
    return {name: load_file(run.member(name) / "adapter_model.safetensors") for name in trainer.grouping.groups}


@pytest.mark.parametrize("make", [sft, text])
def test_as_many_groups_as_gain_are_trained_at_once(make, tmp_path, clock, uncounted):
    trainer = make(tmp_path / "run", concurrent_groups="auto")
    trainer.group_tasks()
    begun = len(clock.passes)
    trainer.train_groups()
    found = trainer.run_directory.read(Concurrency)
    count = len(trainer.grouping.groups)
    assert count >= 3 and found.num_at_once == count
    assert [trial.speed_up for trial in found.trials] == [trial.num_at_once for trial in found.trials]
    # Of as many timed rounds each, of the groups' own batches.
    assert {len(trial.seconds) for trial in found.trials} == {4}
    assert BATCH * count in clock.passes[begun:]


class Told(TrainerCallback):
    def __init__(self):
        self.events = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append(args.output_dir)

    def on_step_begin(self, args, state, control, **kwargs):
        self.events.append(state.global_step)


@pytest.mark.parametrize("make", [sft, text])
def test_measuring_leaves_no_trace_in_the_run(make, tmp_path, clock, monkeypatch):
    monkeypatch.setattr("helpers.toy.lora", partial(toy.lora, lora_dropout=0.3))
    clock.counts_rows = True
    alone, auto = make(tmp_path / "alone"), make(tmp_path / "auto", concurrent_groups="auto")
    told = {}
    for name, trainer in {"alone": alone, "auto": auto}.items():
        trainer.group_tasks()
        told[name] = Told()
        trainer.add_callback(told[name])
        torch.manual_seed(5)
        trainer.train_groups()
        told[name].events = [str(event).replace(str(trainer.args.output_dir), "") for event in told[name].events]
    run = auto.run_directory
    found = run.read(Concurrency)
    assert found.num_at_once == 1 and [trial.speed_up for trial in found.trials] == [1.0]
    # Also where dropout draws random numbers.
    for name, expected in weights(alone).items():
        assert all(torch.equal(own, expected[key]) for key, own in weights(auto)[name].items())
        one, other = (own.run_directory.trained_adapter(name) for own in (alone, auto))
        assert (one.training_loss, one.tokens, one.first_step) == (other.training_loss, other.tokens, other.first_step)
    assert told["auto"].events == told["alone"].events


def test_random_states_and_the_model_are_put_back(tmp_path, clock):
    trainer = sft(tmp_path / "run", concurrent_groups="auto")
    with trainer.working():
        training = trainer.flow.training
        before = torch.get_rng_state()
        parameters = {name: own.clone() for name, own in trainer.model.named_parameters()}
        assert groups_at_once(training, {task: {task: 1.0} for task in TASKS}, 12) == 4
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(own, parameters[name]) for name, own in trainer.model.named_parameters())
    assert all(own.grad is None for own in trainer.model.parameters())
    # In the first and the last round, which are not timed, as in the others: each alone, two at once, four at once.
    assert [clock.passes.count(count * BATCH) for count in (1, 2, 4)] == [4 * 6, 6, 6]


def test_a_run_that_goes_on_trains_as_many_as_before(tmp_path, clock, uncounted, monkeypatch):
    first = sft(tmp_path / "run", concurrent_groups="auto")
    first.group_tasks()
    mixtures = first.grouping.mixtures
    with first.working():
        clock.most = 2 * BATCH
        assert groups_at_once(first.flow.training, mixtures, 12) == 2
    assert first.run_directory.read(Concurrency).reason.endswith("at once do not fit into memory")
    clock.most = 1000
    clock.passes.clear()
    monkeypatch.setattr(concurrency, "chosen_concurrency", lambda *_: pytest.fail("measured again"))
    second = sft(tmp_path / "run", concurrent_groups="auto")
    second.train_groups()
    assert max(clock.passes) == 2 * BATCH and set(second.grouping.groups) == set(mixtures)


def test_half_as_many_go_on_where_memory_runs_out_in_the_trainings(tmp_path, clock, uncounted):
    trainer = sft(tmp_path / "run", concurrent_groups="auto", save_strategy="steps", save_steps=1)
    trainer.group_tasks()
    count, step = len(trainer.grouping.groups), []

    class Fills(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            step.append(state.global_step)
            clock.most = 2 * BATCH

    trainer.add_callback(Fills())
    clock.passes.clear()
    trainer.train_groups()
    found = trainer.run_directory.read(Concurrency)
    assert count >= 3 and found.num_at_once == count // 2
    assert found.reason == f"memory ran out in trainings of {count} at once" and found.trials
    # Steps that were made are not made again.
    assert sorted(step) == sorted([1, 2, 3] * count)
    assert len(weights(trainer)) == count


def test_trainings_that_are_too_short_are_not_measured(tmp_path, clock, monkeypatch):
    monkeypatch.undo()
    trainer = sft(tmp_path / "run", concurrent_groups="auto")
    with trainer.working():
        assert groups_at_once(trainer.flow.training, {task: {task: 1.0} for task in TASKS}, 4 * 239) == 1
    assert "too short" in trainer.run_directory.read(Concurrency).reason


@pytest.mark.parametrize(
    ("options", "attribute", "obstacle"),
    [
        (
            {"neftune_noise_alpha": 5.0},
            None,
            "neftune_noise_alpha=5.0, whose noise depends on the length of the longest row beside",
        ),
        ({}, threading.Lock(), "a model that cannot be copied: cannot pickle '_thread.lock' object"),
    ],
    ids=["argument", "model"],
)
def test_what_groups_cannot_be_trained_at_once_with_is_said_once(options, attribute, obstacle, tmp_path, clock, caplog):
    trainer = sft(tmp_path / "run", concurrent_groups="auto", **options)
    trainer.model.own = attribute
    with caplog.at_level("INFO"):
        trainer.train_groups()
    said = [record.getMessage() for record in caplog.records if "Training one group" in record.getMessage()]
    assert said == [f"Training one group after the other: training several at once does not go with {obstacle}"]
    assert not trainer.run_directory.has(Concurrency) and max(clock.passes) == BATCH


@pytest.mark.parametrize("config", [EnsembleConfig, EnsembleSFTConfig])
def test_the_command_line_takes_a_number_or_auto(config):
    for word, expected in (("auto", "auto"), ("4", 4)):
        (args,), _ = parse([config], ["--concurrent_groups", word, "--output_dir", "x", "--use_cpu", "true"])
        assert args.concurrent_groups == expected
