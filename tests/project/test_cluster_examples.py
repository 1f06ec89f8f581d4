"""What examples/ starts on a cluster are commands that there are, each when what it needs is done."""

import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from helpers.begun_runs import begun
from hf_ensemble.cli.arguments import TrainArguments
from hf_ensemble.cli.parsing import parse
from hf_ensemble.runs.progress import stage_needs

EXAMPLES = Path(__file__).parents[2] / "examples"
PARTS = 3


@pytest.fixture(scope="module")
def needs(tmp_path_factory):
    """The stages of a run with every stage that jobs are made of, and what each needs, by kind."""
    found = {}
    for name, choices in {
        "on": {"group_initialization": "baseline", "calibration_runs": 1},
        "fresh": {"group_initialization": "fresh", "calibration_runs": 3},
    }.items():
        for stage, own in stage_needs(begun(tmp_path_factory.mktemp(name), choices)).items():
            kinds = {need.partition(":")[0] for need in own}
            found.setdefault(stage.partition(":")[0], set()).update(kinds)
    # Where they have no job of their own, the evaluation makes them.
    return {stage: own for stage, own in found.items() if stage not in ("weights", "boosting")}


def parsed(line):
    """Stage and shard of a command line."""
    words = line.split()
    assert words[:2] == ["hf-ensemble", "train"] and "run.yaml" in line
    kept = [word for word in words[2:] if "run.yaml" not in word and word != "--config"]
    (arguments,), left = parse([TrainArguments], kept, command="train")
    assert not left.line
    return arguments.stage, arguments.shard


def check(jobs, needs):
    """Jobs as (stage, shard) with the stages that each waits for, themselves and through others."""
    assert {stage for stage, _ in jobs} == set(needs)
    for (stage, _), waited in jobs.items():
        assert needs[stage] <= waited, stage
    for stage in needs:
        shards = [shard for own, shard in jobs if own == stage]
        count = PARTS if stage in ("gradients", "gradients_at_baseline", "calibration", "adapter") else 1
        expected = [f"{index}/{count}" for index in range(count)]
        assert shards in (expected, [None] * (count == 1))


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Programs of a cluster that write down how they are called, one line each."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))

    def make(name, answer="", status=0):
        path = folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> "$CALLS"\n{answer}\nexit {status}\n')
        path.chmod(0o755)

    def calls(name):
        lines = (tmp_path / "calls").read_text().splitlines()
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]

    return SimpleNamespace(make=make, calls=calls)


def bash(script, *arguments, **environment):
    done = subprocess.run(
        ["bash", str(EXAMPLES / script), *arguments], env={**os.environ, **environment}, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_slurm_jobs_depend_on_what_they_need(programs, needs):
    programs.make("sbatch", 'wc -l < "$CALLS"')
    code, said = bash("slurm/submit.sh", "run.yaml", str(PARTS))
    assert code == 0, said
    jobs, stages = {}, {}
    for number, line in enumerate(programs.calls("sbatch"), start=1):
        *options, script, config, stage, parts = line.split()
        assert script.endswith("slurm/stage.sbatch") and config == "run.yaml" and parts == str(PARTS)
        # One whose dependency has failed does not wait for ever.
        assert "--kill-on-invalid-dep=yes" in options
        given = dict(option.removeprefix("--").split("=", 1) for option in options if "=" in option)
        waited = set()
        for own in given.get("dependency", "afterok:").removeprefix("afterok:").split(":"):
            waited |= stages.get(own, set())
        stages[str(number)] = {stage, *waited}
        if "array" in given:
            assert given["array"] == f"0-{PARTS - 1}"
        count = PARTS if "array" in given else 1
        jobs |= {(stage, f"{index}/{count}" if count > 1 else None): waited for index in range(count)}
    check(jobs, needs)


@pytest.mark.parametrize(("status", "ends"), [(0, 0), (1, 1), (75, 0), (143, 0)])
def test_a_slurm_job_is_the_command_and_is_requeued_where_it_has_to(programs, status, ends):
    programs.make("srun", status=status)
    programs.make("scontrol")
    # One task of an array has the id of the array.
    array = {
        "SLURM_ARRAY_JOB_ID": "17",
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_ARRAY_TASK_COUNT": "3",
        "SLURM_JOB_ID": "17",
    }
    code, said = bash("slurm/stage.sbatch", "run.yaml", "gradients", **array)
    assert code == ends, said
    assert bash("slurm/stage.sbatch", "run.yaml", "baseline", SLURM_JOB_ID="20")[0] == ends
    assert [parsed(line) for line in programs.calls("srun")] == [("gradients", "2/3"), ("baseline", None)]
    assert programs.calls("scontrol") == (["requeue 17_2", "requeue 20"] if status in (75, 143) else [])


def test_some_parts_of_a_slurm_array_are_submitted_again(programs):
    programs.make("srun")
    array = {
        "SLURM_ARRAY_JOB_ID": "17",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_ARRAY_TASK_COUNT": "1",
        "SLURM_JOB_ID": "17",
    }
    assert bash("slurm/stage.sbatch", "run.yaml", "gradients", "8", **array)[0] == 0
    assert [parsed(line) for line in programs.calls("srun")] == [("gradients", "3/8")]


@pytest.fixture
def kubernetes(programs):
    """Writes kubectl, which keeps the Jobs that it makes and answers with their conditions, and runs submit.sh."""
    if subprocess.run(["bash", "-c", "command -v envsubst"], capture_output=True).returncode:
        # Of gettext.
        programs.make(
            "envsubst",
            'sed "s|\\$NAME|$NAME|; s|\\$STAGE|$STAGE|; s|\\$PARTS|$PARTS|; s|\\$IMAGE|$IMAGE|; s|\\$CONFIG|$CONFIG|"',
        )
    programs.make("sleep")

    def submitted(answer, **environment):
        made = 'create) cat >> "$CALLS.yaml"; echo "---" >> "$CALLS.yaml" ;;'
        programs.make("kubectl", f"case $1 in {made} get) {answer} ;; esac")
        own = {"IMAGE": "registry/image:1", "RUN": "first", **environment}
        return bash("kubernetes/submit.sh", "run.yaml", str(PARTS), **own)

    return submitted


def test_kubernetes_jobs_are_made_when_what_they_need_is_complete(programs, kubernetes, needs):
    # Each Job is asked for twice.
    code, said = kubernetes('[ $(grep -c "get job $3 " "$CALLS") = 1 ] || echo SuccessCriteriaMet Complete')
    assert code == 0, said
    applied = [own for own in yaml.safe_load_all(Path(os.environ["CALLS"] + ".yaml").read_text()) if own]
    jobs, asked, waiting = {}, [], iter(applied)
    for line in programs.calls("kubectl"):
        if line.startswith("get"):
            asked.append(line.split()[2].removeprefix("first-").replace("-", "_"))
            continue
        done = {stage for stage in asked if asked.count(stage) >= 2}
        job = next(waiting)
        spec = job["spec"]
        (container,) = spec["template"]["spec"]["containers"]
        assert container["image"] == "registry/image:1" and spec["completionMode"] == "Indexed"
        assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [75]
        count, command = spec["completions"], " ".join(container["command"])
        for index in range(count):
            stage, shard = parsed(command.replace("$(JOB_COMPLETION_INDEX)", str(index)))
            assert job["metadata"]["name"] == f"first-{stage.replace('_', '-')}"
            jobs[stage, shard] = done
    check(jobs, needs)


def test_kubernetes_jobs_end_at_one_that_has_failed_and_need_an_image(programs, kubernetes):
    code, said = kubernetes("echo FailureTarget Failed", RUN="")
    assert code == 1 and re.search(r"hf-ensemble-\d{8}-\d{6}-baseline has failed: kubectl logs", said)
    assert len([line for line in programs.calls("kubectl") if line.startswith("create")]) == 3
    code, said = kubernetes("echo Complete", IMAGE="")
    assert code and "Expected the image" in said and len(programs.calls("kubectl")) == 4


def test_tasks_of_ray_wait_for_what_they_need(monkeypatch, needs):
    ran = []

    class Task:
        """What Ray makes of a function; its results stand for the stages that they rest on."""

        def __init__(self, function):
            self.function = function

        def remote(self, line, folder, *needed):
            stage, shard = parsed(" ".join(line))
            assert self.function(line, folder, *[None] * len(needed)) is None
            waited = set().union(*needed)
            ran.append(((stage, shard), waited))
            return {stage, *waited}

    def remote(max_retries, retry_exceptions=False, **options):
        # Of a lost machine, not of a command that fails.
        assert max_retries and not retry_exceptions
        return Task

    ray = SimpleNamespace(init=lambda: None, get=lambda results: results, remote=remote)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(subprocess, "run", lambda line, check, cwd: subprocess.CompletedProcess(line, 0))
    monkeypatch.setattr(sys, "argv", ["stages.py", "--config", "run.yaml", "--parts", str(PARTS)])
    runpy.run_path(str(EXAMPLES / "ray" / "stages.py"), run_name="__main__")
    check(dict(ran), needs)


def test_a_task_of_ray_tries_again_after_a_pause_what_was_too_early(monkeypatch):
    run = runpy.run_path(str(EXAMPLES / "ray" / "stages.py"))["run"]
    codes, pauses = [75, 75, 0, 75, 1], []

    def ended(line, check, cwd):
        code = codes.pop(0)
        if check and code:
            raise subprocess.CalledProcessError(code, line)
        return subprocess.CompletedProcess(line, code)

    monkeypatch.setattr(subprocess, "run", ended)
    monkeypatch.setattr(time, "sleep", pauses.append)
    run(["hf-ensemble"], ".")
    assert codes == [75, 1] and len(pauses) == 2 and min(pauses) >= 10
    with pytest.raises(subprocess.CalledProcessError):
        run(["hf-ensemble"], ".")
    assert not codes


def test_every_folder_of_the_examples_is_listed():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    folders = {path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {"slurm", "ray", "kubernetes"} and all(f"`{name}/`" in listed for name in folders)
