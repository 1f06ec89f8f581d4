"""Does a run that was killed at any moment end as one that was not?

    python -m benchmarks.kills.run OUTPUT --kills 20

A small ensemble run and a selection run with meta-initialization, both with checkpoints and packing (`workload.py`),
are killed with SIGKILL and started again. The kills go around the stages, from imports to what `save_model` writes.
Within its stage a kill comes after a random delay, or before a random change of a file, so that also what lies between
two writes is met. What the run leaves is compared with what an uninterrupted one has left.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing import Process, get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..common import ROOT, make_parser, read_results, write_results
from ..models import write_tiny_llama
from .artefacts import artefacts, differences, losses
from .table import table
from .workload import FIRST, FLOWS, current_stage, work

# From the start of a process to the first line of `work`, as far as it matters for when to kill it.
SECONDS_OF_IMPORTS = 5.0
# Of all differences of one kill, those that are written down.
_NAMED = 10


class Flow:
    """A run that is made without interruption once, and then killed.

    Args:
        name (`str`): one of `FLOWS`.
        work (`Path`): folder that holds `base`. Every run is made in the same folder below it, so that all paths agree.
        seed (`int`): of the moments.
    """

    def __init__(self, name: str, work: Path, seed: int):
        self.name = name
        self.folder = work / name
        self.random = random.Random(f"{name}{seed}")
        events = work / f"{name}.jsonl"
        start, process = time.perf_counter(), self._forked(events=events)
        starts: dict[str, float] = {}
        while process.is_alive():
            starts.setdefault(current_stage(self.folder / "run"), time.perf_counter() - start)
            time.sleep(0.002)
        if process.exitcode != 0:
            errors = (self.folder / "errors.txt").read_text()
            raise RuntimeError(f"The uninterrupted run of {name!r} ended with {process.exitcode}: {errors}")
        ends = [*list(starts.values())[1:], time.perf_counter() - start]
        self.seconds = {stage: end - begin for (stage, begin), end in zip(starts.items(), ends)}
        self.seconds[FIRST] += SECONDS_OF_IMPORTS
        self.events = [json.loads(line) for line in events.read_text().splitlines()]
        self.expected, self.losses = artefacts(self.folder), losses(self.folder)

    def _executed(self) -> subprocess.Popen:
        """The run in a process that imports everything."""
        self.folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", f"{__package__}.workload", self.name, str(self.folder)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _forked(self, **options: Any) -> Process:
        """The run in a process that has imported everything already."""
        self.folder.mkdir(exist_ok=True)
        process = get_context("fork").Process(target=_work_silently, args=(self.name, self.folder), kwargs=options)
        process.start()
        return process

    def kill(self, stage: str, by: str) -> dict:
        """Kill a fresh run in one of its stages, start it again, and compare.

        Args:
            stage (`str`): one of those that the uninterrupted run has gone through.
            by (`str`): `"delay"` or `"file"`.
        """
        moment, seconds = None, self.seconds[stage]
        # A process that has ended before its moment was not killed.
        while moment is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            delay = self.random.uniform(0, seconds)
            moment = self._killed_before_a_file(stage) if by == "file" else self._killed_after_a_delay(stage, delay)
            seconds = delay
        reached = current_stage(self.folder / "run")
        kill = {"stage": stage, "by": by, "moment": moment, **({} if reached == stage else {"reached": reached})}
        process = self._forked()
        process.join()
        if process.exitcode != 0:
            errors = (self.folder / "errors.txt").read_text().splitlines()
            return {**kill, "differences": [f"ended with {process.exitcode}: {errors[-1] if errors else ''}"]}
        found = [*differences(self.expected, artefacts(self.folder)), *self._differences_of_losses()]
        return {**kill, "differences": found[:_NAMED]}

    def _killed_before_a_file(self, stage: str) -> str | None:
        number = self.random.choice([i for i, event in enumerate(self.events) if event["stage"] == stage])
        process = self._forked(kill_at=number)
        process.join()
        moment = f"{self.events[number]['event']} {self.events[number]['path']}"
        return moment if process.exitcode == -signal.SIGKILL else None

    def _killed_after_a_delay(self, stage: str, delay: float) -> str | None:
        if stage == FIRST:
            process = self._executed()
            time.sleep(delay)
            process.kill()
            return f"{delay:.3f} s" if process.wait() == -signal.SIGKILL else None
        process = self._forked()
        while process.is_alive() and current_stage(self.folder / "run") != stage:
            time.sleep(0.002)
        time.sleep(delay)
        process.kill()
        process.join()
        return f"{delay:.3f} s" if process.exitcode == -signal.SIGKILL else None

    def _differences_of_losses(self) -> list[str]:
        """In what the resumed process logged; of trainings that were finished before the kill it may have no log."""
        found = losses(self.folder)
        for name in ("loss", "metrics"):
            if found[name] != self.losses[name]:
                return list(differences(self.losses[name], found[name], f"{name}: "))
        trainings = {entry["adapter"] for entry in found["history"] if "adapter" in entry}
        expected = [entry for entry in self.losses["history"] if entry.get("adapter") in trainings]
        own = [entry for entry in found["history"] if "adapter" in entry]
        return list(differences(expected, own, "log: "))


def _work_silently(flow: str, folder: Path, **options: Any) -> None:
    """[`work`] in a process of its own, whose output goes to a file."""
    with (folder / "errors.txt").open("w") as errors:
        for stream in (1, 2):
            os.dup2(errors.fileno(), stream)
        work(flow, folder, **options)


def moments(stages: Sequence[str], count: int) -> list[tuple[str, str]]:
    """Stage and kind of each kill: around the stages, with both kinds in turn in each."""
    rounds = [divmod(number, len(stages)) for number in range(count)]
    return [(stages[position], ("delay", "file")[(position + turn) % 2]) for turn, position in rounds]


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--kills", type=int, default=20, help="kills of each run")
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=list(FLOWS), help="others keep their results")
    parser.add_argument("--stages", nargs="+", help="stages that are killed; all by default")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    results = {"flows": {}, **read_results(arguments.output)}
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Threads do not survive a fork.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    # Nor is a lock between processes released by one that is killed.
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        write_tiny_llama(folder / "base")
        for name in arguments.flows:
            flow = Flow(name, folder, arguments.seed)
            kills = []
            for stage, by in moments(arguments.stages or list(flow.seconds), arguments.kills):
                kills.append(flow.kill(stage, by))
                print(name, json.dumps(kills[-1]), flush=True)
            seconds = {stage: round(own, 2) for stage, own in flow.seconds.items()}
            results["flows"][name] = {"seconds": seconds, "files": len(flow.expected), "kills": kills}
            write_results(arguments.output, results, table)


if __name__ == "__main__":
    main()
