"""What the studies share: argument parsing, clocks, memory, rows on disk, and writing results with their tables."""

import argparse
import json
import os
import re
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_ensemble._compat import package_versions
from hf_ensemble.evaluate import RowScores

ROOT = Path(__file__).parents[1]
SPLITS = ("train", "validation", "test")
# Entries that `write_results` puts in front of what a study measured.
HEADER = ("commands", "machine", "versions")

Table = Callable[[dict], str]


def module_name(file: str | Path) -> str:
    """Dotted module name of a script, as `python -m` takes it."""
    return ".".join(Path(file).resolve().relative_to(ROOT).with_suffix("").parts)


def make_parser(file: str, description: str | None, output: bool = True) -> argparse.ArgumentParser:
    """Make the parser of a script.

    Args:
        file (`str`): the script's `__file__`.
        description (`str`): its docstring.
        output (`bool`, *optional*, defaults to `True`): whether the first argument says where the results go.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module_name(file)}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # Unknown flags are passed on: `--seed` must not be taken for `--seeds`.
        allow_abbrev=False,
    )
    if output:
        parser.add_argument("output", help="path of the results, without .json and .md")
    return parser


def add_machine_flags(parser: argparse.ArgumentParser, device: bool = False, threads: int = 1) -> None:
    """Add `--threads`, and `--device` for studies that also run on a GPU."""
    parser.add_argument("--threads", type=int, default=threads, help="CPU threads")
    if device:
        parser.add_argument("--device", default="cpu", help="cpu or cuda")


def shape_of(arguments: argparse.Namespace, *without: str) -> dict[str, Any]:
    """Arguments that describe what is measured, for the results."""
    return {name: value for name, value in vars(arguments).items() if name not in ("output", *without)}


def stated_command() -> str:
    """Command line of this process; a path outside the repository is cut to its last part."""
    words = []
    for word in sys.argv[1:]:
        flag, equals, value = word.partition("=") if "=" in word else ("", "", word)
        path = Path(value)
        if path.is_absolute() or value.startswith(".."):
            path = path.resolve()
            value = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        words.append(f"{flag}{equals}{value}")
    return shlex.join(["python", "-m", module_name(sys.argv[0]), *words])


def machine(device: str = "cpu") -> dict[str, Any]:
    """The machine that times were measured on."""
    is_cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else f"CPU, {os.cpu_count()} cores",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def write_results(output: str, results: dict, table: Table, device: str = "cpu") -> None:
    """Write OUTPUT.json and, from it, OUTPUT.md; print the tables.

    Args:
        output (`str`): path of both without their endings.
        results (`dict`): what was measured. `commands` of earlier runs that measured other parts are extended;
            `machine` and `versions` are kept where they are given.
        table (`Callable[[dict], str]`): the results as Markdown.
        device (`str`, *optional*, defaults to `"cpu"`): the device they were measured on.
    """
    commands = [*results.get("commands", []), stated_command()]
    header = {
        "commands": list(dict.fromkeys(commands)),
        "machine": results.get("machine") or machine(device),
        "versions": results.get("versions") or package_versions(),
    }
    results = {**header, **{name: value for name, value in results.items() if name not in HEADER}}
    path = Path(f"{output}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, default=lambda value: value.item()) + "\n")
    path.with_name(f"{path.stem}.md").write_text(document(results, table))
    print(table(results), flush=True)


def read_results(output: str, **shape: Any) -> dict:
    """Contents of OUTPUT.json, to which other parts are added; empty if there is no such file.

    Args:
        output (`str`): path of the file without its ending.
        shape (`Any`): arguments that all of its parts share; what was measured with others is measured anew.
    """
    path = Path(f"{output}.json")
    results = json.loads(path.read_text()) if path.exists() else {}
    stated = results.get("shape", results)
    return results if all(name in stated and stated[name] == value for name, value in shape.items()) else {}


def document(results: dict, table: Table) -> str:
    """Markdown of a result file: its commands, then its tables."""
    commands = "\n".join(_wrapped(command) for command in results["commands"])
    return f"```bash\n{commands}\n```\n\n{table(results)}"


def _wrapped(command: str, width: int = 110) -> str:
    lines = [""]
    for part in re.split(r" (?=--)", command):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] = f"{lines[-1]} {part}" if lines[-1] else part
    return "\n".join(lines)


def rows_over_seeds(made: Sequence[Mapping[str, RowScores]]) -> dict[str, RowScores]:
    """Mean scores of each row over the seeds, by task."""

    def mean(values: Callable[[RowScores], np.ndarray], task: str) -> np.ndarray:
        return np.mean([values(one[task]) for one in made], axis=0)

    return {
        task: RowScores(
            mean(lambda rows: rows.loss, task),
            mean(lambda rows: rows.correct, task),
            metrics={name: mean(lambda rows, name=name: rows.metrics[name], task) for name in own.metrics},
        )
        for task, own in made[0].items()
    }


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["|" + "".join(f" {cell} |" if cell != "" else " |" for cell in row) for row in (header, *rows)]
    return [lines[0], "|---" * len(header) + "|", *lines[1:]]


def formatted(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def mean_and_deviation(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def clock(device: str | torch.device = "cpu") -> float:
    """CPU seconds of this process; on a GPU, wall time after a synchronization."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def peak_memory() -> int:
    """Peak resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def process_memory(name: str) -> int:
    """A field of `/proc/self/status`, such as `VmRSS` or `RssAnon`, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024


def random_subsets(count: int, num_tasks: int, size: int, seed: int) -> np.ndarray:
    """Membership matrix `(count, num_tasks)` of random subsets of `size` tasks."""
    return np.random.default_rng(seed).random((count, num_tasks)).argsort(axis=1) < size


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def drawn_tasks(
    data: Path, folder: Path, limits: Mapping[str, int], seed: int, names: Sequence[str] | None = None
) -> Path:
    """Copy tasks with a seeded sample of the rows of each split; returns the folder.

    Args:
        data (`Path`): holds `NAME/SPLIT.jsonl`.
        folder (`Path`): where the copies go.
        limits (`dict[str, int]`): most rows of a task by split; those that are absent are copied whole.
        seed (`int`): of the samples.
        names (`Sequence[str]`, *optional*): which tasks; all by default.
    """
    for task in sorted(path for path in data.iterdir() if path.is_dir() and (names is None or path.name in names)):
        for number, split in enumerate(SPLITS):
            rows = read_rows(task / f"{split}.jsonl")
            count = min(limits.get(split, len(rows)), len(rows))
            order = np.random.default_rng([seed, number]).permutation(len(rows))
            # Every label is among the rows.
            firsts = {rows[index].get("label"): index for index in order[::-1]}
            chosen = list(dict.fromkeys([*firsts.values(), *order]))[:count]
            write_rows(folder / task.name / f"{split}.jsonl", [rows[index] for index in sorted(chosen)])
    return folder
