"""Commands that are stopped: one line, an exit status, nothing left running, and the run goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tqdm import tqdm

from helpers import toy
from hf_ensemble.cli.command import Command
from hf_ensemble.cli.main import main
from hf_ensemble.errors import TaskError

LINE = "hf-ensemble: stopped. Run the same command again to continue."


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_with_one_line(monkeypatch, capsys, number, status):
    closed = []

    def stopped(argv):
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            closed.append(True)

    monkeypatch.setattr(Command, "load", lambda self: stopped)
    before = signal.getsignal(signal.SIGTERM)
    # A shell that starts the tests in the background ignores it for them.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["demo"]) == status and closed
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert capsys.readouterr().err.splitlines() == [LINE]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TaskError("no rows.")])
def test_an_open_progress_bar_does_not_swallow_the_line(monkeypatch, capsys, error):
    bars = []

    def stopped(argv):
        bars.append(tqdm(total=10, desc="Capturing", file=sys.stderr, mininterval=0))
        bars[0].update(3)
        raise error

    monkeypatch.setattr(Command, "load", lambda self: stopped)
    main(["demo"])
    bars[0].refresh()
    bars[0].close()
    last = capsys.readouterr().err.replace("\r", "\n").rstrip("\n").splitlines()[-1]
    assert last.startswith("hf-ensemble: ")


def test_a_worker_dies_of_the_signal_without_a_traceback(tmp_path):
    code = """
import os, signal, sys, time
from hf_ensemble.cli.stopping import sigterm_as_interrupt
with sigterm_as_interrupt():
    child = os.fork()
    if child == 0:
        time.sleep(30)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == str(-signal.SIGTERM) and not done.stderr


@pytest.mark.slow
def test_a_terminated_run_leaves_nothing_running_and_goes_on(tmp_path):
    for name, splits in toy.sft_tasks().items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for split, rows in splits.items():
            (tmp_path / "data" / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = toy.save_model(toy.llama(), tmp_path / "base")
    flags = f"--data {tmp_path / 'data'} --model_name_or_path {base} --output_dir {tmp_path / 'run'} --use_cpu true "
    flags += "--bf16 false --projection_dim 32 --num_components 10 --affinity_subsets 10 --num_groups 2 "
    flags += "--dataloader_num_workers 1 --save_strategy steps --save_steps 5 --report_to none --num_train_epochs 10 "
    flags += "--lora_target_modules q_proj v_proj --gradient_checkpointing false --logging_strategy no"
    command = [sys.executable, "-m", "hf_ensemble.cli.main", "run", *flags.split()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    while not list(tmp_path.glob("run/training/baseline/checkpoint-*")) and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors.decode()
    assert errors.decode().replace("\r", "\n").rstrip().splitlines()[-1] == LINE
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert main(["run", *flags.split()]) == 0
