"""The study of mixtures that are solved anew during a training runs at toy sizes, and each way draws what it says."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import DataCollatorForSeq2Seq

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.remixing import run as study
from benchmarks.remixing.mixers import DoReMiProxy, FixedShares, OnlineDataMixing
from benchmarks.remixing.training import AdapterTrainer, Cycle, Step
from helpers import toy
from helpers.task_files import flags, write_tasks
from helpers.trainers import sft_config
from hf_ensemble.select import DataSelector
from hf_ensemble.tasks import TASK, TaskCollator, TaskSet, encode


class Rows:
    """What mixers read of a training."""

    def __init__(self, *counts):
        ends = np.cumsum([0, *counts])
        self.rows_of = [np.arange(start, end) for start, end in zip(ends, ends[1:])]


def test_every_way_runs_and_is_not_made_again(tmp_path, monkeypatch, capsys):
    data, model = write_tasks(tmp_path / "data", toy.sft_tasks()), toy.save_model(toy.llama(), tmp_path / "model")
    tasks = list(toy.sft_tasks())
    own = ["--tasks", *tasks, "--targets", tasks[0], "--rows", "6", "--validation_rows", "4", "--test_rows", "3"]
    more = flags(data=data, model_name_or_path=model, output_dir=tmp_path / "out", num_train_epochs=2, capture_rows=3)
    monkeypatch.setattr(sys, "argv", [study.__file__, str(tmp_path / "results"), *own, "--seeds", "0", *more])
    proxies, mixtures, mixture = [], [], DataSelector.mixture

    def proxy(training, reference):
        proxies.append(DoReMiProxy(training, reference))
        return proxies[-1]

    def solved(selector, targets):
        found = mixture(selector, targets)
        mixtures.append((targets, [found.probabilities.get(name, 0.0) for name in sorted(tasks)]))
        return found

    monkeypatch.setattr(study, "DoReMiProxy", proxy)
    monkeypatch.setattr(DataSelector, "mixture", solved)
    study.main()
    first = (tmp_path / "results.json").read_text()
    ways = json.loads(first)["goals"][study.ALL]
    assert set(ways) == {*study.SHARED, *study.OF_GOAL}
    assert ways[study.PROPORTIONAL]["cost"] == ways[study.ODM]["cost"] == 1.0
    assert 1.0 < ways[study.STATIC]["cost"] < ways[study.REMIXED]["cost"]
    assert ways[study.PROPORTIONAL + study.LONGER]["cost"] == pytest.approx(ways[study.REMIXED]["cost"], abs=0.2)
    assert ways[study.DOREMI]["cost"] > 3.0
    made = json.loads((tmp_path / "out" / "0" / "trainings" / "proportional.json").read_text())
    assert proxies[0].reference.tolist() == made["losses"] and len(made["losses"]) == 6 * len(tasks)
    assert ways[study.DOREMI]["first_shares"] == proxies[0].mean_weights.tolist()
    for goal, targets in ((study.ALL, None), (tasks[0], [tasks[0]])):
        found = json.loads(first)["goals"][goal]
        # Anew before each of two epochs, and once; before the first step, both solve the same problem.
        remixed, last, static = [shares for own, shares in mixtures if own == targets]
        assert found[study.REMIXED]["first_shares"] == found[study.STATIC]["first_shares"] == remixed == static
        assert found[study.REMIXED]["last_shares"] == last and found[study.STATIC]["last_shares"] == static
    text = (tmp_path / "results.md").read_text()
    assert f"## For {tasks[0]}" in text and "| mixture, re-solved |" in text
    monkeypatch.setattr(study.Seed, "_trained", lambda *_: pytest.fail("made again"))
    study.main()
    assert (tmp_path / "results.json").read_text() == first
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--without", study.ODM, study.DOREMI])
    study.main()
    assert f"| {study.ODM} |" not in (tmp_path / "results.md").read_text()


class Listed:
    """A mixer that draws what it is told to, and weighs the tasks of every second step."""

    weights = np.array([0.0, 3.0, 1.0])

    def __init__(self):
        self.begun, self.steps = [], []

    def begin_epoch(self, first_step):
        self.begun.append(first_step)

    def draw(self, count):
        return np.array([2, 0, 1, 2, 1, 2])[:count] if len(self.steps) % 2 else np.zeros(count, dtype=int)

    def task_losses(self, step):
        self.steps.append(step)
        return None if len(self.steps) % 2 else self.weights


def test_a_training_draws_and_weighs_what_its_mixer_says(tmp_path, monkeypatch):
    tasks = TaskSet.from_datasets(toy.sft_tasks(6, 2))
    context = SimpleNamespace(
        model=toy.with_lora(toy.llama()),
        tasks=tasks,
        train_table=encode(tasks.table("train"), toy.tokenizer(), tasks.row_format),
        data_collator=TaskCollator(DataCollatorForSeq2Seq(toy.tokenizer(), label_pad_token_id=-100)),
        args=sft_config(tmp_path, per_device_train_batch_size=6, learning_rate=1e-2),
        label_space=None,
    )
    training, mixer, weighted, loss = AdapterTrainer(context, 0), Listed(), [], AdapterTrainer._loss

    def recorded(losses, drawn, weights):
        weighted.append((losses.tolist(), drawn, weights))
        return loss(losses, drawn, weights)

    monkeypatch.setattr(AdapterTrainer, "_loss", staticmethod(recorded))
    before = training.losses()
    assert training.train(mixer, 2) == 36 and mixer.begun == [0, 3] and len(mixer.steps) == len(weighted) == 6
    for number, (step, (losses, drawn, weights)) in enumerate(zip(mixer.steps, weighted)):
        expected = [2, 0, 1, 2, 1, 2] if number % 2 else [0] * 6
        assert step.tasks.tolist() == drawn.tolist() == expected
        assert [training.table[int(row)][TASK] for row in step.rows] == [training.names[task] for task in expected]
        assert weights is (mixer.weights if number % 2 else None) and step.losses.tolist() == losses
    # Those of the step's own rows, before its update.
    assert mixer.steps[0].losses == pytest.approx(before[mixer.steps[0].rows], abs=1e-4)
    assert not np.allclose(training.losses(), before, atol=1e-3)


def test_the_loss_of_a_step_is_the_weighted_sum_of_the_tasks_means():
    losses, tasks = torch.tensor([1.0, 2.0, 4.0, 8.0]), np.array([0, 1, 1, 2])
    assert AdapterTrainer._loss(losses, tasks, None) == 15 / 4
    weights = np.array([0.5, 0.25, 2.0])
    assert AdapterTrainer._loss(losses, tasks, weights) == 0.5 * 1 + 0.25 * (2 + 4) / 2 + 2 * 8


def test_shares_are_kept_in_every_batch():
    shares = FixedShares(np.array([0.5, 0.3, 0.2]))
    counts = [np.bincount(shares.draw(10), minlength=3).tolist() for _ in range(5)]
    assert counts == [[5, 3, 2]] * 5
    cycle = Cycle(np.arange(4), np.random.default_rng(0))
    assert sorted(cycle.next() for _ in range(4)) == sorted(cycle.next() for _ in range(4)) == [0, 1, 2, 3]


def test_odm_prefers_tasks_with_high_losses_and_leaves_none_out():
    mixer = OnlineDataMixing(Rows(8, 8, 8), seed=0)
    for _ in range(60):
        tasks = mixer.draw(16)
        assert np.all(tasks.reshape(4, 4) == tasks[::4, None])
        assert mixer.task_losses(Step(tasks, np.array([4.0, 0.5, 0.5])[tasks], tasks)) is None
        assert mixer.shares.sum() == pytest.approx(1) and mixer.shares.min() > 0
    assert mixer.shares.argmax() == 0
    mixer.shares = np.array([0.0, 1.0, 0.0])
    assert mixer.draw(6).tolist() == [1] * 6


def test_odm_sets_shares_as_its_paper_says():
    """Algorithm 1 of arXiv 2312.02406: K tasks, at turn t."""
    mixer, count, turns = OnlineDataMixing(Rows(2, 4, 6), seed=0), 3, 5
    shares, rewards = [1 / 6, 1 / 3, 1 / 2], [0.0] * count
    drawn, losses = np.repeat([2, 0], 4), np.repeat([1.5, 3.0], 4)
    for turn in range(1, turns):
        mixer.task_losses(Step(drawn, losses + turn, np.arange(8)))
        for task, loss in ((2, 1.5 + turn), (0, 3.0 + turn)):
            rewards[task] = 0.9 * rewards[task] + 0.1 * loss / shares[task]
        now, then = (min(1 / count, math.sqrt(math.log(count) / (count * t))) for t in (turn, turn + 1))
        weights = [math.exp(now * reward) for reward in rewards]
        shares = [(1 - count * then) * weight / sum(weights) + then for weight in weights]
        assert mixer.shares == pytest.approx(shares)
    assert max(shares) > 1.3 * min(shares)


def test_doremi_weighs_tasks_by_their_excess_loss():
    mixer = DoReMiProxy(Rows(4, 4), reference=np.repeat([1.0, 0.2], 4))
    rows = np.arange(8)
    step = Step(np.repeat([0, 1], 4), np.repeat([0.5, 1.2], 4), rows)
    first = mixer.task_losses(step)
    # A task whose loss is below the reference has no excess.
    expected = 0.999 * np.exp([0.0, 1.0]) / np.exp([0.0, 1.0]).sum() + 0.0005
    assert first == pytest.approx(expected)
    mixer.task_losses(step)
    assert mixer.mean_weights.sum() == pytest.approx(1) and mixer.mean_weights[1] > first[1]
