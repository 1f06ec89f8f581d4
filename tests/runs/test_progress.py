"""What stages of a run need, how far they are, and how they wait for each other."""

import os
import socket

import pytest

from helpers.begun_runs import begun
from hf_ensemble.errors import ConfigurationError, StageNotReadyError
from hf_ensemble.runs import RunDirectory, StageProgress, run_progress
from hf_ensemble.runs.progress import stage_needs, stages_named, wait_for_needs
from hf_ensemble.select import Grouping


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
