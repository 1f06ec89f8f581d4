"""The study of mixtures that are solved anew during a training runs at toy sizes, and each way draws what it says."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.remixing import run as study
from benchmarks.remixing.mixers import DoReMiProxy, FixedShares, OnlineDataMixing
from benchmarks.remixing.training import Cycle, Step
from helpers import toy
from helpers.task_files import flags, write_tasks


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
    study.main()
    first = (tmp_path / "results.json").read_text()
    ways = json.loads(first)["goals"][study.ALL]
    assert set(ways) == {*study.SHARED, *study.OF_GOAL}
    assert ways[study.PROPORTIONAL]["cost"] == ways[study.ODM]["cost"] == 1.0
    assert 1.0 < ways[study.STATIC]["cost"] < ways[study.REMIXED]["cost"]
    assert ways[study.PROPORTIONAL + study.LONGER]["cost"] == pytest.approx(ways[study.REMIXED]["cost"], abs=0.2)
    assert ways[study.DOREMI]["cost"] > 3.0
    # Before the first step, both solve the same problem.
    assert ways[study.STATIC]["first_shares"] == ways[study.REMIXED]["first_shares"]
    text = (tmp_path / "results.md").read_text()
    assert f"## For {tasks[0]}" in text and "| mixture, re-solved |" in text
    monkeypatch.setattr(study.Seed, "_trained", lambda *_: pytest.fail("made again"))
    study.main()
    assert (tmp_path / "results.json").read_text() == first
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--without", study.ODM, study.DOREMI])
    study.main()
    assert f"| {study.ODM} |" not in (tmp_path / "results.md").read_text()


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
