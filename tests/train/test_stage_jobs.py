"""Stages of a run as jobs that are started in any order, side by side and killed, which end as a run by itself does."""

import json
import os
import socket
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from helpers import toy
from helpers.processes import run_python
from helpers.trainers import sft_config, sft_trainer, split
from hf_ensemble import SelectionSFTConfig, SelectionSFTTrainer
from hf_ensemble._settings import checked_shard
from hf_ensemble.errors import ConfigurationError, RunLockedError, RunMismatchError, StageNotReadyError
from hf_ensemble.runs import (
    RunDirectory,
    RunRecord,
    StageProgress,
    TaskRecord,
    TasksRecord,
    TrainedAdapter,
    run_progress,
)
from hf_ensemble.runs.progress import stage_needs, stages_named, wait_for_needs
from hf_ensemble.select import Grouping

ROOT = Path(__file__).parents[2]
# One process imports everything and makes the trainer; each job is forked from it, so that only stages take time.
JOBS = """
import json, os, random, shutil, signal, sys
from pathlib import Path
import torch
from tqdm import tqdm
from helpers import toy
from helpers.trainers import sft_trainer
from hf_ensemble.capture import capture
from hf_ensemble.publish import card
from hf_ensemble.errors import RunLockedError, StageNotReadyError
sys.path.insert(0, sys.argv[1])
from benchmarks.kills.artefacts import artefacts, differences
from benchmarks.kills.workload import watched_files

# No thread has to survive a fork.
torch.set_num_threads(1)
tqdm.monitor_interval = 0
card._draw_one = lambda draw, data: None
folder, capture.SHARD_SIZE = Path(sys.argv[2]), 8
model = toy.save_model(toy.llama(), folder / "base")
tasks = {
    f"{name}_{number}": own
    for number in range(2)
    for name, own in toy.sft_tasks(8 + 2 * number, 4).items()
}
trainer = sft_trainer(
    folder / "run", model, tasks, num_groups=4, calibration_runs=3, save_strategy="steps", save_steps=2,
    logging_strategy="steps", logging_steps=1, num_train_epochs=1,
)

def started(work, kill_at=None):
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with watched_files(folder, None, kill_at):
            work()
        code = 0
    except (RunLockedError, StageNotReadyError) as error:
        print(type(error).__name__, error, flush=True)
        code = 75
    finally:
        if code == 1:
            import traceback
            traceback.print_exc()
        os._exit(code)

assert os.waitstatus_to_exitcode(os.waitpid(started(trainer.train), 0)[1]) == 0
expected = artefacts(folder)
shutil.rmtree(folder / "run")

jobs = [("gradients", (index, 3)) for index in range(3)]
jobs += [("baseline", None), ("calibration:2", None), ("calibration:3", None), ("group", None)]
jobs += [("adapter", (index, 4)) for index in range(4)] + [("evaluation", None)]
# Changes of files before which a job is killed: amid a shard, and amid a checkpoint.
kills = {jobs[1]: 38, jobs[5]: 50, jobs[7]: 50}
random.Random(int(sys.argv[3])).shuffle(jobs)
waiting, early, running, killed, ended = list(jobs), [], {}, [], 0
while waiting or running:
    while waiting and len(running) < 2:
        job = waiting.pop(0)
        work = lambda: trainer.run_stage(*job)
        running[started(work, kills.get(job))] = job
    process, status = os.wait()
    job, code = running.pop(process), os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL:
        killed.append(job)
        del kills[job]
    if code == 75:
        early.append(job)
    elif code == -signal.SIGKILL:
        waiting.append(job)
    else:
        assert code == 0, job
        ended += 1
    if code != 75 or not running:
        # As schedulers requeue, when something has changed.
        waiting, early = [*waiting, *early], []
found = list(differences(expected, artefacts(folder)))
with open(folder / "found.json", "w") as file:
    json.dump({"differences": found, "killed": killed, "ended": ended, "files": len(expected)}, file)
"""


@pytest.mark.slow
def test_twelve_jobs_in_any_order_three_of_them_killed_end_as_one_run(tmp_path):
    done = run_python(JOBS, str(ROOT), str(tmp_path), "0", folder=ROOT / "tests")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["differences"] == [] and found["ended"] == 12 and len(found["killed"]) == 3
    assert found["files"] > 40
    # Some were started before what they need, and have named it.
    assert "StageNotReadyError" in done.stdout


def begun(folder, choices=None, **arguments):
    """A run over six tasks that holds its records alone."""
    given = {"seed": 0, "train_baseline": True, **arguments}
    own = {"calibration_runs": 1, "group_initialization": "fresh", "boosting_steps": 0, **(choices or {})}
    run = RunDirectory.open(folder, {"arguments": given}, own)
    run.write(TasksRecord("x", "y", dict.fromkeys("abcdef", TASK)))
    return run


TASK = TaskRecord({"train": 4}, {"train": "0"}, None, 1.0)


def test_stages_and_what_they_need_follow_from_the_configuration(tmp_path):
    assert stage_needs(begun(tmp_path / "fresh", {"calibration_runs": 3, "boosting_steps": 2})) == {
        "gradients": [],
        "baseline": [],
        "calibration:2": [],
        "calibration:3": [],
        "group": ["gradients", "baseline", "calibration:2", "calibration:3"],
        "adapter": ["group"],
        "weights": ["adapter"],
        "boosting": ["weights"],
        "evaluation": ["adapter"],
    }
    on = stage_needs(begun(tmp_path / "on", {"group_initialization": "baseline"}))
    assert on["gradients_at_baseline"] == ["baseline"]
    assert on["group"] == ["gradients", "baseline", "gradients_at_baseline"]
    alone = stage_needs(begun(tmp_path / "alone", {"calibration_runs": 2}, train_baseline=False))
    assert list(alone)[:3] == ["gradients", "calibration:1", "calibration:2"]
    selection = begun(tmp_path / "selection", {"target": "a"}, train_baseline=False, meta_initialization=True)
    assert stage_needs(selection) == {
        "meta": [],
        "gradients": ["meta"],
        "calibration:1": ["meta"],
        "select": ["gradients", "calibration:1"],
        "adapter": ["select"],
        "evaluation": ["adapter"],
    }


def test_progress_tells_what_is_done_running_interrupted_and_missing(tmp_path):
    run = begun(tmp_path, {"group_initialization": "baseline"})
    with pytest.raises(KeyboardInterrupt), run.stage("gradients"):
        raise KeyboardInterrupt
    with RunDirectory(tmp_path).stage("baseline"):
        found = {stage.name: stage for stage in run_progress(run)}
        assert found["gradients"] == StageProgress("gradients", "interrupted")
        assert found["baseline"].status == "running" and f"process {os.getpid()}" in found["baseline"].detail
        assert found["gradients_at_baseline"] == StageProgress("gradients_at_baseline", "waiting", ["baseline"])
        with run.stage_locked("gradients:1-of-3"):
            assert run_progress(run)[0].status == "running" and run_progress(run)[1].name == "baseline"
    found = {stage.name: stage.status for stage in run_progress(run)}
    assert found["baseline"] == "done" and found["gradients_at_baseline"] == "ready"
    with pytest.raises(ConfigurationError, match="Expected a run in"):
        run_progress(RunDirectory(tmp_path / "other"))


def test_an_evaluation_is_running_where_a_process_works_in_the_whole_run(tmp_path):
    run = begun(tmp_path)
    run.write(
        Grouping(
            {"group_0": ["a"]},
            {},
            "direct",
            task_names=["a"],
            affinity=[],
            predicted_loss={},
            cost=1.0,
            summary="",
            settings={},
        )
    )
    with run.locked():
        assert run_progress(run)[-1].status == "waiting"
        for name in ("gradients", "baseline", "group", "adapter:group_0"):
            with run.stage(name):
                pass
        found = run_progress(run)[-1]
    assert found == StageProgress("evaluation", "running", [], f"process {os.getpid()} on {socket.gethostname()}")
    assert run_progress(run)[-1] == StageProgress("evaluation", "ready")


def test_waiting_names_what_is_missing_and_ends_when_it_is_there(tmp_path, monkeypatch):
    run, told = begun(tmp_path), []
    with pytest.raises(StageNotReadyError, match=r"group needs .*: gradients \(ready\), baseline \(ready\)\."):
        wait_for_needs(run, "group", 0, told.append)
    assert told == []

    def sleep(seconds):
        # What other processes do in the meantime.
        with RunDirectory(tmp_path).stage(["gradients", "baseline"][len(told) - 1]):
            pass

    monkeypatch.setattr("hf_ensemble.runs.progress.time.sleep", sleep)
    wait_for_needs(run, "group", 60, told.append)
    assert told == ["group waits for gradients (ready), baseline (ready)", "group waits for baseline (ready)"]


def test_other_processes_of_a_job_wait_for_one_look_at_a_time(tmp_path, monkeypatch):
    run, looks = begun(tmp_path), []

    def on_main(look):
        looks.append(None)
        if len(looks) == 2:
            for name in ("gradients", "baseline"):
                with RunDirectory(tmp_path).stage(name):
                    pass
        return look()

    monkeypatch.setattr("hf_ensemble.runs.progress.run_on_main", on_main)
    monkeypatch.setattr("hf_ensemble.runs.progress.time.sleep", lambda seconds: None)
    wait_for_needs(run, "group", 60, str)
    assert len(looks) == 2


def test_names_stand_for_stages_and_shards_for_every_nth(tmp_path):
    run = begun(tmp_path, {"calibration_runs": 4})
    assert stages_named(run, "calibration") == ["calibration:2", "calibration:3", "calibration:4"]
    assert stages_named(run, "calibration", (1, 2)) == ["calibration:3"]
    assert stages_named(run, "calibration", (3, 8)) == [] == stages_named(run, "gradients_at_baseline")
    # Until groups are chosen, each of them waits for the choice.
    assert stages_named(run, "adapter:group_5") == ["adapter"]
    with pytest.raises(ConfigurationError, match="Unknown stage 'groups'; the stages are"):
        stages_named(run, "groups")


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


@pytest.mark.parametrize("shard", [(0.9, 8), (0, 8.0), "0/8/2", "-1/8", (0,), 3])
def test_parts_are_whole_numbers(shard):
    with pytest.raises(ConfigurationError, match="Expected shard as INDEX/COUNT"):
        checked_shard("shard", shard)


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


def files(folder):
    found = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".npy", ".arrow")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_a_selection_is_made_by_its_stages(tmp_path, base_folder, monkeypatch):
    monkeypatch.setattr("hf_ensemble.capture.capture.SHARD_SIZE", 8)
    tasks, settings = toy.sft_tasks(8, 4), {"meta_initialization": True, "max_auxiliary": 1, "calibration_runs": 2}

    def trainer(folder):
        return SelectionSFTTrainer(
            model=base_folder,
            args=sft_config(folder, SelectionSFTConfig, num_train_epochs=1, **settings),
            train_dataset=split(tasks, "train"),
            eval_dataset=split(tasks, "validation"),
            peft_config=toy.lora(),
            target="sums",
        )

    trainer(tmp_path / "whole").train()
    first, second = trainer(tmp_path / "run"), trainer(tmp_path / "run")
    with pytest.raises(StageNotReadyError, match=r"gradients needs .* meta \(ready\)"):
        first.run_stage("gradients", (0, 2))
    first.run_stage("meta")
    # Jobs that begin at it read it at the same time.
    with FileLock(tmp_path / "run" / ".stages" / "meta" / ".run.lock"):
        for name, shard in [("calibration", "1/2"), ("gradients", (0, 2)), ("adapter", "1/2")]:
            with pytest.raises(StageNotReadyError) if name == "adapter" else nullcontext():
                second.run_stage(name, shard)
    for name, shard in [("gradients", (1, 2)), ("calibration:1", None), ("select", None), ("adapter", None)]:
        first.run_stage(name, shard)
    assert {stage.name for stage in run_progress(first.run_directory) if stage.status != "done"} == {"evaluation"}
    second.run_stage("evaluation")
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    with pytest.raises(ConfigurationError, match="Unknown stage 'weights'; the stages are"):
        second.run_stage("weights")


def test_weights_and_boosting_steps_are_stages(tmp_path, base_folder):
    def trainer(folder):
        settings = {"num_groups": 2, "num_train_epochs": 1, "projection_dim": None, "boosting_steps": 1}
        return sft_trainer(folder, base_folder, save_report=False, **settings)

    trainer(tmp_path / "whole").train()
    own = trainer(tmp_path / "run")
    own.group_tasks()
    with pytest.raises(
        StageNotReadyError, match=r"weights needs .* adapter:group_0 \(ready\), adapter:group_1 \(ready\)"
    ):
        own.run_stage("weights")
    run = own.run_directory
    for name in ("adapter", "weights", "boosting"):
        assert run.record.stages.get(name) is None
        own.run_stage(name)
        if name == "adapter":
            expected = [(known.name, known.first_step) for known in run.trainings()]
            # As if another job had made it at the same time.
            run.write_trained_adapter(replace(run.trained_adapter("group_1"), first_step=0))
    assert [(known.name, known.first_step) for known in run.trainings()] == expected
    other = trainer(tmp_path / "run")
    other.run_stage("evaluation")
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    assert {stage.status for stage in run_progress(other.run_directory)} == {"done"}


def test_a_run_is_not_started_over_while_others_work_in_it(tmp_path):
    run = begun(tmp_path)
    with run.stage_locked("baseline"), pytest.raises(RunLockedError, match="started over .*: baseline \\(process"):
        RunDirectory.open(tmp_path, {"arguments": {"seed": 1}}, {}, overwrite=True)
    RunDirectory.open(tmp_path, {"arguments": {"seed": 1}}, {}, overwrite=True)
