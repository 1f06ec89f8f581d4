"""Runs that are opened, resumed, changed, damaged, or worked in by several processes."""

import json
import os
import shutil
from dataclasses import replace
from threading import Thread

import numpy as np
import pytest

from helpers.begun_runs import begun
from helpers.trainers import sft_trainer
from hf_ensemble.errors import RecordError, RunLockedError, RunMismatchError
from hf_ensemble.evaluate import TaskScores
from hf_ensemble.runs import (
    Estimate,
    Evaluation,
    Results,
    RunDirectory,
    RunRecord,
    ScoredRun,
    TaskRecord,
    TasksRecord,
    TrainedAdapter,
    layout,
    run_selector,
)
from hf_ensemble.select import Grouping
from hf_ensemble.store import CapturedRows, GradientStoreWriter


def test_stages_are_recorded_and_resumed(tmp_path):
    run = RunDirectory.open(tmp_path, {"a": 1}, {"b": 2})
    with run.stage("gradients") as todo:
        assert todo
    with pytest.raises(KeyboardInterrupt), run.stage("group"):
        raise KeyboardInterrupt
    again = RunDirectory.open(tmp_path, {"a": 1}, {"b": 2})
    assert again.is_done("gradients") and again.seconds("gradients") >= 0 and not again.is_done("group")
    with again.stage("gradients") as todo:
        assert not todo
    with again.stage("group") as todo:
        assert todo
    # The time of an interrupted stage is not known.
    assert again.is_done("group") and again.seconds("group") is None


def test_differences_are_named_and_only_what_depends_on_them_is_redone(tmp_path):
    run = RunDirectory.open(tmp_path, {"a": {"x": 1}}, {"b": 2})
    for name in ("gradients", "group", "adapter:group_0", "weights"):
        with run.stage(name):
            pass
    (tmp_path / "ensemble").mkdir()
    (tmp_path / "gradients").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunMismatchError, match=r"a.x: found 1, expected 3; b: found 2, expected 5.*overwrite_run=True"):
        RunDirectory.open(tmp_path, {"a": {"x": 3}}, {"b": 5})
    chosen = RunDirectory.open(tmp_path, {"a": {"x": 1}}, {"b": 5}, overwrite=True)
    assert list(chosen.record.stages) == ["gradients"]
    assert not (tmp_path / "ensemble").exists() and (tmp_path / "gradients").exists()
    anew = RunDirectory.open(tmp_path, {"a": {"x": 3}}, {"b": 5}, overwrite=True)
    assert anew.record.stages == {} and not (tmp_path / "gradients").exists()
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_kill_over_an_old_run_leaves_its_card(tmp_path, monkeypatch):
    RunDirectory.open(tmp_path, {"a": 1}, {"b": 2})
    (tmp_path / "ensemble" / "adapters").mkdir(parents=True)
    (tmp_path / "ensemble" / "config.json").write_text("{}")
    (tmp_path / "ensemble" / "README.md").write_text("written by hand")
    (tmp_path / "comparison.md").write_text("| old |")
    remove = shutil.rmtree

    def killed(folder, **options):
        remove(folder, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            RunDirectory.open(tmp_path, {"a": 1}, {"b": 3}, overwrite=True)
    assert (tmp_path / "ensemble" / "README.md").read_text() == "written by hand"
    RunDirectory.open(tmp_path, {"a": 1}, {"b": 3}, overwrite=True)
    left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(left) == [".record.lock", "ensemble/README.md", "run.json"]


def test_records_of_single_trainings_are_kept_by_name(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.trained_adapter("x") is None and run.scored_run(["a"], 0, "f00") is None and run.scored_runs() == []
    trained = TrainedAdapter("x", {"a": 1.0, "b": 0.5}, 3, "f00", 4, "done", training_loss=0.5, global_step=7)
    run.write_trained_adapter(trained)
    scored = ScoredRun({"b": 1.0, "a": 1.0}, 3, {"a": TaskScores(0.5, 1.0, 4)}, 1.5, 0.25, "f00")
    weighted = replace(scored, mixture={"a": 1.0, "b": 0.25})
    on = replace(scored, theta0="f02", length=0.5)
    for own in (scored, weighted, on):
        run.write_scored_run(own)
    assert run.trained_adapter("x") == trained
    others = {"name": "y", "mixture": {"a": 1.0}, "seed": 4, "theta0": "f01", "length": 0.5}
    assert trained.continues(run.trained_adapter("x"))
    assert not any(replace(trained, **{name: value}).continues(trained) for name, value in others.items())
    # By the weights of the tasks, the seed, and where trainings begin and how long they are.
    assert run.scored_run(["a", "b"], 3, "f00") == scored and run.scored_run(["a", "b"], 4, "f00") is None
    assert run.scored_run({"b": 0.25, "a": 1.0, "c": 0.0}, 3, "f00") == weighted
    assert run.scored_run({"b": 0.5}, 3, "f00") is None
    assert run.scored_run(["a", "b"], 3, "f02", 0.5) == on and run.scored_run(["a", "b"], 3, "f02") is None
    assert len(run.scored_runs()) == 3 and scored.as_observed().losses == {"a": 0.5}
    assert weighted.as_observed().mixture == {"a": 1.0, "b": 0.25} and weighted.subset == ["a", "b"]


def test_every_record_of_a_finished_run_reads_back(finished):
    run = RunDirectory(finished[0].run_directory.path)
    for kind in (RunRecord, TasksRecord, Grouping, Estimate, Evaluation):
        data = json.loads(run.where(kind).read_text())
        assert data["format"] == kind.format and data["format_version"] == kind.format_version
        assert run.read(kind).to_dict().items() <= data.items()
    assert run.read(Estimate).l2_evidence == "observed_runs" and len(run.read(Estimate).calibration_subsets) == 1
    assert run.read(Evaluation).reported_split == "eval"
    selector = run_selector(run, num_components=20)
    assert selector.group(num_groups=2, affinity_subsets=20).groups == finished[0].grouping.groups
    assert selector.estimator.observed_runs


def small_store(folder, theta0):
    plan = [("train" if i < 20 else "validation", "ab"[i % 2], str(i)) for i in range(40)]
    identity = {"model": {"theta0": theta0}, "config": {}}
    writer = GradientStoreWriter(folder, identity=identity, plan=plan, dim=6)
    rows = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    ones = np.ones(40)
    writer.write_shard(0, CapturedRows(rows, ones, np.log1p(np.exp(-ones)), ones))
    writer.finish(versions={})


def test_trainings_are_evidence_for_those_of_their_length_and_start(tmp_path):
    run = RunDirectory(tmp_path)
    task = TaskRecord({"train": 10, "validation": 10}, {"train": "", "validation": ""}, None, 1.0)
    run.write(TasksRecord("prompt_completion", "f", {"a": task, "b": task}))
    small_store(run.gradients, "start")
    small_store(run.baseline_gradients, "on")
    whole = ScoredRun({"a": 1.0}, 0, {"a": TaskScores(0.25, 1.0, 4)}, 1.0, 1.0, "start")
    half = replace(whole, mixture={"b": 1.0}, theta0="on", length=0.5)
    for own in (whole, half, replace(half, length=1.0), replace(whole, theta0="on"), replace(whole, length=2.0)):
        run.write_scored_run(own)
    assert run_selector(run).estimator.observed_runs == (whole.as_observed(),)
    assert run_selector(run, continued_length=0.5).estimator.observed_runs == (half.as_observed(),)
    assert run_selector(run, continued_length=0.25).estimator.observed_runs == ()


@pytest.mark.parametrize("kind", [kind for kind in layout.RECORDS if kind is not Results])
def test_damaged_records_are_named(tmp_path, kind):
    run = RunDirectory(tmp_path)
    file = run.where(kind)
    file.parent.mkdir(parents=True, exist_ok=True)
    for text, message in [
        ('{"format": ', "cannot be|truncated|JSON"),
        ("[]", "expected an object"),
        ('{"format": "other", "format_version": 1}', "has format 'other'"),
        (json.dumps({"format": kind.format, "format_version": 99}), "Upgrade hf_ensemble"),
        (json.dumps({"format": kind.format, "format_version": 1}), "missing"),
    ]:
        file.write_text(text)
        with pytest.raises(RecordError, match=message) as caught:
            run.read(kind)
        assert str(file) in str(caught.value)


def test_a_damaged_run_record_stops_a_run_before_anything_is_lost(tmp_path, base_folder):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"format": "hf_ensem')
    with pytest.raises(RecordError, match=r"run\.json"):
        sft_trainer(tmp_path / "run", base_folder).open_run()
    assert (tmp_path / "run" / "run.json").read_text() == '{"format": "hf_ensem'


def test_what_processes_record_at_the_same_time_is_kept(tmp_path, monkeypatch):
    first, second = begun(tmp_path), RunDirectory(tmp_path)
    write, waiting, beside = RunDirectory.write, ["gradients", "calibration:2"], []

    def record(name):
        with second.stage(name):
            pass

    def slow(run, own):
        # Another process begins to record once this one has read what it adds to.
        if run is first:
            beside.append(Thread(target=record, args=(waiting.pop(0),)))
            beside[-1].start()
            beside[-1].join(0.2)
        write(run, own)

    monkeypatch.setattr(RunDirectory, "write", slow)
    with first.stage("baseline"):
        pass
    for thread in beside:
        thread.join()
    stages = RunDirectory(tmp_path).record.stages
    assert {name: stage.status for name, stage in stages.items()} == dict.fromkeys(
        ("baseline", "gradients", "calibration:2"), "done"
    )


def test_processes_record_their_stages_beside_each_other(tmp_path):
    first, second = begun(tmp_path), RunDirectory(tmp_path)
    with first.stage("baseline"), second.stage("gradients"):
        pass
    with first.part_of_stage("gradients_at_baseline", (0, 2), lambda: False) as todo:
        assert todo
    cost = second.read(RunRecord).stages["gradients_at_baseline"].cost
    with second.part_of_stage("gradients_at_baseline", (1, 2), lambda: True) as todo:
        assert todo
    record = RunDirectory(tmp_path).record
    assert {name: stage.status for name, stage in record.stages.items()} == dict.fromkeys(
        ("baseline", "gradients", "gradients_at_baseline"), "done"
    )
    whole = record.stages["gradients_at_baseline"]
    assert whole.cost.seconds >= cost.seconds and RunDirectory(tmp_path).seconds("gradients_at_baseline") is None
    with second.part_of_stage("gradients_at_baseline", (1, 2), lambda: True) as todo:
        assert not todo
    # One that starts over ends the others before they write what is not theirs.
    RunDirectory.open(tmp_path, {"arguments": {"seed": 1}}, {}, overwrite=True)
    with pytest.raises(RunMismatchError, match="Another process has started the run in .* over"), first.stage("group"):
        pass


def test_what_takes_the_same_rows_is_refused_and_keeps_what_others_have_recorded(tmp_path):
    run, other = begun(tmp_path), RunDirectory(tmp_path)

    def part(run, shard):
        return run.part_of_stage("gradients", shard, lambda: False)

    def recorded():
        return RunDirectory(tmp_path).record.stages["gradients"]

    with part(run, (0, 2)):
        pass
    cost, holder = recorded().cost, f"process {os.getpid()} on"
    with part(run, (1, 2)), part(other, (0, 2)):
        for work in (other.stage("gradients"), part(other, (1, 3))):
            with pytest.raises(RunLockedError, match=f"gradients-0-of-2: {holder} .*give all parts one count"), work:
                pass
        assert recorded().cost == cost
    cost = recorded().cost
    with other.stage("gradients"), pytest.raises(RunLockedError, match=f"on gradients: {holder}"), part(run, (0, 2)):
        pass
    whole = recorded()
    assert whole.status == "done" and whole.cost.seconds >= cost.seconds > 0
    # Parts that come late find it done.
    with part(other, (1, 3)) as todo:
        assert not todo


def test_gradients_of_other_rows_keep_what_was_trained(tmp_path):
    def opened(rows, **options):
        configuration = {"arguments": {"seed": 0}, "capture": {"capture_rows": {"a": rows}}}
        return RunDirectory.open(tmp_path, configuration, {"num_groups": 1}, **options)

    kept, gone = ("baseline", "training"), ("gradients", "gradients_at_baseline", "estimate", "ensemble")
    run = opened(5)
    for name in ("gradients", "baseline", "meta", "group", "adapter:group_0"):
        with run.stage(name):
            pass
    for name in (*kept, *gone):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "file").write_text("")
    with pytest.raises(RunMismatchError, match="configuration: capture_rows.a: found 5, expected 9"):
        opened(9)
    again = opened(9, overwrite=True)
    assert set(again.record.stages) == {"baseline", "meta"} and again.record.configuration["capture"]
    assert [(tmp_path / name).exists() for name in (*kept, *gone)] == [True, True, False, False, False, False]


def test_steps_of_trainings_that_were_made_side_by_side_count_on(tmp_path):
    run = begun(tmp_path)
    for name, first in [("baseline", 0), ("group_0", 5), ("group_1", 5)]:
        run.write_trained_adapter(TrainedAdapter(name, {"a": 1.0}, 0, "f", first, "done", global_step=5))
    run.order_trainings(["baseline", "scored-x", "group_0", "group_1"])
    assert [(own.name, own.first_step) for own in run.trainings()] == [("baseline", 0), ("group_0", 5), ("group_1", 10)]
    # Those that were made in turn are left as they are.
    run.write_trained_adapter(TrainedAdapter("group_1", {"a": 1.0}, 0, "f", 30, "done", global_step=5))
    run.order_trainings(["baseline", "group_0", "group_1"])
    assert run.trained_adapter("group_1").first_step == 30


def test_a_run_is_not_started_over_while_others_work_in_it(tmp_path):
    run = begun(tmp_path)
    with run.stage_locked("baseline"), pytest.raises(RunLockedError, match="started over .*: baseline \\(process"):
        RunDirectory.open(tmp_path, {"arguments": {"seed": 1}}, {}, overwrite=True)
    RunDirectory.open(tmp_path, {"arguments": {"seed": 1}}, {}, overwrite=True)
