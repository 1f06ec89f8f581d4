"""Stages of a run as jobs that are started in any order, side by side and killed, which end as a run by itself does."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from helpers import toy
from helpers.processes import run_python
from helpers.trainers import sft_config, sft_trainer, split
from hf_ensemble import SelectionSFTConfig, SelectionSFTTrainer
from hf_ensemble.errors import ConfigurationError, StageNotReadyError
from hf_ensemble.runs import run_progress

ROOT = Path(__file__).parents[2]
# One process imports everything and makes the trainer; each job is forked from it, so that only stages take time.
JOBS = """
import json, os, random, shutil, signal, sys, threading
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

# No thread has to survive a fork, and no lock between processes a kill.
torch.set_num_threads(1)
tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())
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
