"""Two processes, killed processes, damaged files."""

import errno
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from filelock import FileLock

from helpers import toy
from helpers.trainers import sft_trainer
from hf_ensemble import write_model_card
from hf_ensemble.errors import RecordError, RunLockedError, WriteError
from hf_ensemble.runs import RunDirectory
from hf_ensemble.runs.lock import exclusive_record
from hf_ensemble.train.flows.checkpoints import last_whole_checkpoint, seal_checkpoint

HOLD = """
import sys
from hf_ensemble.runs import RunDirectory
with RunDirectory(sys.argv[1]).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path, base_folder):
    run = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline().strip() == "held"
        trainer = sft_trainer(run, base_folder, overwrite_run=True)
        with pytest.raises(RunLockedError, match=f"process {holder.pid} on .*choose another output_dir"):
            trainer.train()
        # A killed holder holds nothing.
        holder.kill()
        holder.wait()
        with RunDirectory(run).locked(), RunDirectory(run).locked():
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()


def test_another_thread_of_the_process_works_in_the_run_too(tmp_path):
    def works():
        with RunDirectory(tmp_path).locked():
            return True

    with RunDirectory(tmp_path).locked(), ThreadPoolExecutor() as pool:
        assert pool.submit(works).result()


@pytest.mark.parametrize("reason", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch, reason):
    def flock(file, operation):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(WriteError, match=r"without file locks \(flock\): .*Lustre with -o flock and NFS as version 4"):
        RunDirectory.open(tmp_path / "run", {}, {})
    assert list((tmp_path / "run").iterdir()) == []


def test_who_waits_for_long_says_what_for(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_ensemble._locks._TOLD_AFTER", 0.05)
    other, told = FileLock(tmp_path / ".record.lock"), []
    other.acquire()
    monkeypatch.setattr("hf_ensemble._locks.logger.warning", lambda *said: (told.append(said), other.release()))
    with exclusive_record(tmp_path):
        pass
    assert told == [("Waiting for another process, which holds the lock %s.", tmp_path / ".record.lock")]


def test_threads_of_a_process_change_a_record_one_after_the_other(tmp_path):
    events = []

    def changes():
        events.append("waits")
        with exclusive_record(tmp_path):
            events.append("changes")

    with ThreadPoolExecutor() as pool:
        with exclusive_record(tmp_path), exclusive_record(tmp_path):
            other = pool.submit(changes)
            with pytest.raises(TimeoutError):
                other.result(timeout=0.2)
            events.append("is done")
        other.result(timeout=10)
    assert events == ["waits", "is done", "changes"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    left = [
        ".run.json.abc.tmp",
        "estimate/.weights.json.x.tmp",
        "training/.one.json.y.tmp",
        "ensemble/adapters/.g.z.tmp",
        "ensemble/assets/.affinity.png.v.tmp",
    ]
    for name in [*left, "mine.txt", "ensemble/adapters/group_0/adapter_config.json", "notes/.draft.tmp"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "ensemble" / "adapters" / ".peft.q.tmp" / "default").mkdir(parents=True)
    (tmp_path / "ensemble" / "adapters" / ".group_0.w.tmp.old").mkdir()
    with RunDirectory(tmp_path).locked():
        found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found - {".run.lock", ".run.holder.json", ".record.lock"} == {
        "mine.txt",
        "ensemble/adapters/group_0/adapter_config.json",
        "notes/.draft.tmp",
    }
    assert [path.name for path in (tmp_path / "ensemble" / "adapters").iterdir()] == ["group_0"]


def test_what_a_process_left_that_was_killed_while_it_cleaned_up_is_removed(finished):
    trainer, _, _ = finished
    run = trainer.run_directory
    left = run.training("baseline") / "checkpoint-3" / "optimizer.pt"
    picture = run.ensemble / "assets" / ".affinity.png.v.tmp"
    for path in (left, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    known = run.trained_adapter("baseline")
    assert trainer.flow.training.run("baseline", known.mixture, run.baseline) == known
    write_model_card(run.path)
    assert not left.parent.exists() and not picture.exists()


@pytest.mark.parametrize("name", ["baseline", "ensemble/adapters/group_0"])
def test_a_flipped_bit_in_a_trained_adapter_is_found(finished, tmp_path, name):
    trainer, _, base = finished
    shutil.copytree(trainer.run_directory.path, tmp_path / "run")
    file = tmp_path / "run" / name / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(RecordError, match=r"adapter_model\.safetensors.* damaged or was replaced. Delete the folder"):
        sft_trainer(tmp_path / "run", base, num_groups=2).train()


def checkpoint(folder, step):
    own = folder / f"checkpoint-{step}"
    own.mkdir(parents=True)
    (own / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    torch.save({"a": torch.ones(100)}, own / "optimizer.pt")
    toy.with_lora(toy.llama()).save_pretrained(own)
    seal_checkpoint(own)
    return own


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "adapter_model.safetensors"])
@pytest.mark.parametrize("size", [0, 40])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, name, size):
    whole, damaged = checkpoint(tmp_path, 2), checkpoint(tmp_path, 10)
    file = damaged / name
    file.write_bytes(file.read_bytes()[:size] if name != "trainer_state.json" or not size else b"{")
    assert last_whole_checkpoint(tmp_path) == str(whole)
    assert not damaged.exists()
