"""Stores of samples of rows: which rows, what the store records, and when it is another store."""

import json

import numpy as np
import pytest
from datasets import Dataset

from helpers import toy
from helpers.captures import capture, contents
from helpers.trainers import sft_config, sft_trainer
from hf_ensemble import CaptureConfig, DataSelector, EnsembleSFTConfig, GradientCaptureCallback, TaskSet
from hf_ensemble.capture.row_sample import sample_rows, sampled_positions
from hf_ensemble.cli.parsing import parse
from hf_ensemble.errors import ConfigurationError, StoreMismatchError
from hf_ensemble.store import GradientStore, GradientStoreWriter
from hf_ensemble.tasks import EXAMPLE_ID

IDS = [f"row {number}" for number in range(1000)]


def test_a_sample_has_the_labels_in_their_shares_and_does_not_depend_on_the_order():
    labels = np.repeat([0, 1, 2], [700, 280, 20])
    found = sampled_positions(IDS, labels, 100, "seed")
    assert np.array_equal(np.bincount(labels[found]), [70, 28, 2]) and len(set(found)) == 100
    order = np.random.default_rng(0).permutation(1000)
    other = order[sampled_positions([IDS[i] for i in order], labels[order], 100, "seed")]
    assert set(other) == set(found)
    assert set(sampled_positions(IDS, labels, 100, "another")) != set(found)
    assert np.array_equal(sampled_positions(IDS, labels, 1000, "seed"), np.arange(1000))


def test_every_row_is_drawn_as_often_as_any_other():
    labels = np.arange(30) % 7
    drawn = np.concatenate([sampled_positions(IDS[:30], labels, 11, str(seed)) for seed in range(3000)])
    shares = np.bincount(drawn) / 3000
    assert np.abs(shares - 11 / 30).max() < 5 * np.sqrt(11 / 30 * 19 / 30 / 3000)


def test_a_limit_may_be_one_of_a_task():
    rows = Dataset.from_dict(
        {"task": ["a"] * 9 + ["b"] * 9 + ["c"] * 3, "example_id": IDS[:21], "labels": [0, 1, 1] * 7}
    )
    found = sample_rows(rows, {"a": 4, "c": 4})
    assert found.num_rows == {"a": 9} and found.num_captured == {"a": 4}
    assert [list(found.rows["task"]).count(task) for task in "abc"] == [4, 9, 3]
    assert sample_rows(rows, {"a": None}).rows is rows and sample_rows(rows, 9).rows is rows


def test_limits_are_what_json_holds():
    config = CaptureConfig(capture_rows=np.int64(10), capture_validation_rows={"a": np.int64(5), "b": None})
    assert json.loads(json.dumps(vars(config)["capture_rows"])) == 10
    assert json.dumps(config.capture_validation_rows) == '{"a": 5, "b": null}'


def test_a_task_within_the_limit_is_captured_whole(tmp_path):
    capture(tmp_path / "all")
    capture(tmp_path / "limited", capture_rows=24, capture_validation_rows={"sums": 6}, capture_seed=3)
    assert contents(tmp_path / "all") == contents(tmp_path / "limited")


def test_a_store_of_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_ensemble.capture.capture.SHARD_SIZE", 8)
    limits = {"capture_rows": {"sums": 10}, "capture_validation_rows": 4}
    whole, store = capture(tmp_path / "all"), capture(tmp_path / "some", **limits)
    names = whole.task_names
    every, own = whole.table("train"), store.table("train")
    assert dict(zip(names, own.num_captured)) == {name: 10 if name == "sums" else 24 for name in names}
    assert own.sizes.tolist() == every.sizes.tolist() == [24] * len(names)
    assert store.table("validation").num_captured.tolist() == [4] * len(names)
    # The rows are those of the whole store, and so are their gradients.
    places = [list(zip(every.task, every.example_id)).index(key) for key in zip(own.task, own.example_id)]
    assert np.allclose(own.features[:], every.features[places], rtol=1e-4, atol=1e-6)
    assert store.identity["data"]["num_rows"]["train"] == {"sums": 24}
    assert store.identity["config"]["capture_rows"] == {"sums": 10}
    # A pass that is killed goes on with the same rows.
    write, written = GradientStoreWriter.write_shard, []

    def killed(self, *args, **kwargs):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(1)
        write(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GradientStoreWriter, "write_shard", killed)
        capture(tmp_path / "killed", **limits)
    capture(tmp_path / "killed", **limits)
    assert contents(tmp_path / "killed") == contents(tmp_path / "some")
    for changes, message in (
        ({}, r"config.capture_rows: found \{'sums': 10\}, expected None"),
        ({**limits, "capture_rows": {"sums": 11}}, "config.capture_rows.sums: found 10, expected 11"),
        ({**limits, "capture_validation_rows": 5}, "config.capture_validation_rows.*found 4, expected 5"),
        ({**limits, "capture_seed": 1}, "config.capture_seed: found 0, expected 1"),
    ):
        with pytest.raises(StoreMismatchError, match=message):
            capture(tmp_path / "some", **changes)


def test_choices_from_a_sample(tmp_path):
    store = capture(tmp_path / "some", capture_rows=10)
    selector = DataSelector.from_store(store)
    names = store.task_names
    assert selector.estimator.counts.tolist() == [24] * len(names)
    scores = selector.score_examples(names[0])
    assert all(len(own) == 10 for own in scores.scores.values())
    assert scores.num_without_score() == dict.fromkeys(names, 14)
    assert f"the {10 * len(names)} rows that were captured, of {24 * len(names)}, more often" in scores.summary
    message = "10 of the 24 training rows of 'sums' are captured.*capture_rows=None, or a dict by task without 'sums'"
    with pytest.raises(ConfigurationError, match=message):
        DataSelector.from_store(store, clusters={"sums": 2})
    # Rows that are asked for by name stand for themselves.
    ids = {"sums": list(scores.scores["sums"])[:3]}
    assert store.table("train", ids).sizes.tolist() == [3]


def test_what_is_excluded_is_taken_off(tmp_path):
    store = capture(tmp_path / "some", capture_rows=10)
    excluded = np.zeros(len(store), dtype=bool)
    excluded[0] = True
    store.rows = store.rows.set_column(store.rows.column_names.index("excluded"), "excluded", [excluded])
    table = store.table("train")
    assert table.num_captured[0] == 9 and table.sizes[0] == round(24 * 9 / 10)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "capture_rows has to be an integer of at least 2 or None, found 0"),
        # Nothing would be known of how far the sample is from all rows.
        (1, "capture_rows has to be an integer of at least 2 or None, found 1"),
        (True, "capture_rows has to be an integer of at least 2 or None, found True"),
        ("many", "Expected capture_rows as an integer, or as JSON by task, found 'many'"),
        ({"sums": 1.5}, "capture_rows of 'sums' has to be an integer of at least 2 or None, found 1.5"),
        ({"sums": 1}, "capture_rows of 'sums' has to be an integer of at least 2 or None, found 1"),
    ],
)
def test_limits_that_are_none(value, message):
    with pytest.raises(ConfigurationError, match=message):
        CaptureConfig(capture_rows=value)


def test_limits_of_unknown_tasks_are_refused_before_anything_is_trained(tmp_path):
    limit = {"capture_rows": {"products": 5}}
    message = r"Unknown tasks in capture_rows \['products'\]"
    with pytest.raises(ConfigurationError, match=message):
        capture(tmp_path / "store", **limit)
    with pytest.raises(ConfigurationError, match=message):
        GradientCaptureCallback(TaskSet.from_datasets(toy.sft_tasks()), tmp_path, CaptureConfig(**limit))
    with pytest.raises(ConfigurationError, match=message):
        sft_trainer(tmp_path, toy.save_model(toy.llama(), tmp_path / "base"), **limit)


def test_limits_on_the_command_line(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--capture_rows"]
    for text, expected in (("300", 300), ('{"sums": 5, "copies": null}', {"sums": 5, "copies": None}), ("null", None)):
        (config,), _ = parse([EnsembleSFTConfig], [*flags, text])
        assert config.capture_rows == expected and config.capture_config().capture_rows == expected


def test_a_run_captures_a_sample(tmp_path):
    base = toy.save_model(toy.llama(), tmp_path / "base")
    trainer = sft_trainer(tmp_path / "run", base, capture_rows=5, calibration_runs=0, num_groups=2, num_train_epochs=1)
    trainer.train()
    store = GradientStore(trainer.run_directory.gradients)
    assert set(store.table("train").num_captured) == {5} and set(store.table("train").sizes) == {12}
    # The replayed training has the steps of one on all rows.
    assert len(store.recipe.learning_rates) == -(-12 * len(store.task_names) // 4)
    assert sft_config(tmp_path, capture_rows=5).num_captured_rows("train", {"a": 3, "b": 9}) == 8


def test_a_calibrating_run_knows_its_losses_of_the_captured_rows(tmp_path):
    """Predictions are calibrated by these, and are at the level of all rows."""
    base, tasks = toy.save_model(toy.llama(), tmp_path / "base"), toy.sft_tasks()
    limits = {"capture_validation_rows": dict.fromkeys(list(tasks)[1:], 4), "capture_seed": 3}
    trainer = sft_trainer(tmp_path / "run", base, tasks, calibration_runs=1, num_groups=2, num_train_epochs=1, **limits)
    trainer.train()
    run = trainer.run_directory
    (observed,) = trainer.selector().estimator.observed_runs
    assert set(observed.captured_losses) == set(limits["capture_validation_rows"])
    table, calibration = GradientStore(run.gradients).table("validation"), trainer.selector().estimator.calibration
    with trainer.working():
        context = trainer.flow.context
        ids = {name: table.example_id[table.task == place] for place, name in enumerate(table.task_names)}
        rows = {name: [row for row in context.eval_tables[name] if row[EXAMPLE_ID] in ids[name]] for name in ids}
        assert {len(own) for own in list(rows.values())[1:]} == {4}
        captured = trainer.flow.evaluation.score_adapter(
            run.baseline, {name: Dataset.from_list(own) for name, own in rows.items()}, "Scoring", has_metrics=False
        )
    for place, name in enumerate(table.task_names):
        loss = observed.captured_losses.get(name, observed.losses[name])
        assert loss == pytest.approx(captured[name].loss, rel=1e-5)
        assert calibration.level[place] == pytest.approx(observed.losses[name] / loss)


def test_what_is_captured_where_nothing_is_said():
    assert CaptureConfig().capture_rows == CaptureConfig().capture_validation_rows == 512
    assert CaptureConfig().num_captured_rows("train", {"a": 600, "b": 500}) == 1012
    assert CaptureConfig(capture_rows=None).num_captured_rows("train", {"a": 600, "b": 500}) == 1100
