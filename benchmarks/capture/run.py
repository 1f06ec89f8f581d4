"""What does a capture pass cost, next to a training step and other ways to get per-example gradient features?

    python -m benchmarks.capture.run OUTPUT --model_name_or_path ENCODER

An encoder with a classification head and a Llama-shaped model with random weights, both with LoRA r=8 on every linear
layer of their blocks, see rows of random tokens without padding. All methods take turns in one process, and their times
are compared with the plain forward and backward of the same turn. Memory is measured in a separate process per method.
Models and parts that are not requested keep what an earlier run wrote to OUTPUT.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings

import datasets
import torch
import transformers

from ..common import (
    add_machine_flags,
    clock,
    machine,
    make_parser,
    module_name,
    read_results,
    shape_of,
    write_results,
)
from .memory import largest_tensor, method_memory
from .methods import Capture, Method
from .models import MODELS, Setting, largest_layer_gradients, make_model, make_rows, multiplied_weights
from .peers import METHODS, sign_matrix
from .table import table

# Several times slower than the others, so they take fewer turns.
SLOW = ("published, whole batch", "Bergson, global", "TRAK's projector alone")
DEFAULT_METHODS = tuple(name for name in METHODS if name != "capture, no preconditioner")
OWN = ("plain", "capture")
# What is captured of every model, and where: all parts of the results share it.
_COMMON = ("batch", "length", "dim", "device", "rank", "target_modules")
_SHARED = (*_COMMON, "quantization", "threads")


def settings(arguments) -> list[Setting]:
    common = {key: getattr(arguments, key) for key in _COMMON}
    made = []
    for model in arguments.models:
        own = {"model": model, **common, "path": arguments.model_name_or_path if model == "encoder" else None}
        if model == "encoder":
            made.append(Setting(**own))
            continue
        own["quantization"] = arguments.quantization
        made.append(Setting(**own, answer=arguments.answer))
        if arguments.quantization is None and arguments.answer < arguments.length:
            made.append(Setting(**own, answer=arguments.length))
    return made


def methods_of(setting: Setting, arguments) -> list[str]:
    """Methods to measure; for rows that are all answer, only the plain pass and the capture."""
    few = setting.causal and setting.answer >= setting.length
    return [name for name in arguments.methods if not few or name in OWN]


def batches_of(setting: Setting, arguments) -> int:
    return arguments.batches[min(arguments.models.index(setting.model), len(arguments.batches) - 1)]


def make_methods(model, setting: Setting, arguments) -> tuple[dict[str, Method], dict[str, str]]:
    rows = make_rows(setting, setting.batch * batches_of(setting, arguments))
    made, failed = {}, {}
    for name in methods_of(setting, arguments):
        try:
            method = METHODS[name](model, setting, rows)
            method.clock = lambda: clock(setting.device)
            method.prepare()
            made[name] = method
        except ImportError as error:
            failed[name] = f"not installed ({error.name})"
        except Exception as error:
            if name in OWN:
                raise
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return made, failed


def measure(setting: Setting, arguments) -> dict:
    """Times of every method and turn."""
    model = make_model(setting)
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": adapter,
        "multiplied_weights": multiplied_weights(model),
        "batches": batches_of(setting, arguments),
        "largest_layer_gradients_bytes": largest_layer_gradients(model, setting.batch),
    }
    methods, failed = make_methods(model, setting, arguments)
    methods["plain"].run()
    turns: dict[str, list[dict]] = {name: [] for name in methods}
    for turn in range(arguments.repetitions):
        for name, method in methods.items():
            if name in SLOW and turn >= arguments.slow_repetitions:
                continue
            gc.collect()
            start = clock(setting.device), time.perf_counter()
            try:
                method.run()
            except Exception as error:
                if name in OWN:
                    raise
                failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
                continue
            seconds = {"cpu": clock(setting.device) - start[0], "wall": time.perf_counter() - start[1]}
            turns[name].append({**seconds, "examples": len(method.rows), "once": dict(method.once)})
    result["methods"] = {
        name: {**summary(turns[name], turns["plain"]), "facts": methods[name].facts, "note": methods[name].note}
        for name in methods
        if name not in failed
    } | {name: {"failed": reason} for name, reason in failed.items()}
    sign_matrix.cache_clear()
    return result


def summary(turns: list[dict], plain: list[dict]) -> dict:
    """Seconds per example without what is done once, and their ratios to the plain pass of the same turn."""
    own = {}
    for kind in ("cpu", "wall"):
        once = [sum(part[kind] for part in turn["once"].values()) for turn in turns]
        per = [(turn[kind] - part) / turn["examples"] for turn, part in zip(turns, once)]
        reference = [turn[kind] / turn["examples"] for turn in plain]
        ratios = [a / b for a, b in zip(per, reference)]
        own[kind] = {
            "seconds_per_example": statistics.median(per),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        }
        for name in turns[0]["once"]:
            parts = [turn["once"][name][kind] / turn["once"][name]["rows"] for turn in turns]
            own[kind][f"{name}, ratio per row"] = statistics.median(a / b for a, b in zip(parts, reference))
    return {"turns": turns, **own}


def probe(setting: Setting, name: str, arguments) -> dict:
    """Peak memory of one method, measured in a separate process."""
    command = [sys.executable, "-m", module_name(__file__), "-", "--probe", name, "--models", setting.model]
    command += ["--answer", str(setting.answer)]
    for key in ("batch", "length", "dim", "device", "quantization", "model_name_or_path", "threads", "rank"):
        if getattr(arguments, key) is not None:
            command += [f"--{key}", str(getattr(arguments, key))]
    if arguments.target_modules:
        command += ["--target_modules", *arguments.target_modules]
    # Freed memory is returned at once, so that the peak counts live memory only.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    return json.loads(lines[-1])


def run_probe(arguments) -> dict:
    """Measure memory in this process, on behalf of [`probe`]."""
    setting = next(one for one in settings(arguments) if one.answer == arguments.answer)
    if arguments.probe == "largest":
        return largest_tensor(setting, Capture, 20 if setting.model == "llama" else None, 2)
    return method_memory(setting, METHODS[arguments.probe])


def run_parts(arguments) -> None:
    """Measure the requested parts and write results after each model."""
    results = read_results(arguments.output, **{name: getattr(arguments, name) for name in _SHARED})
    results.setdefault("models", {})
    if "time" in arguments.parts or "shape" not in results:
        # The head of the tables describes the times.
        results["machine"] = machine(arguments.device)
        results["shape"] = shape_of(arguments, "parts", "probe", "model_name_or_path")
        results.pop("versions", None)
    for part in arguments.parts:
        for setting in settings(arguments):
            own = results["models"].setdefault(setting.name, {})
            if part == "time":
                own.update(measure(setting, arguments))
            else:
                own["memory"] = {name: probe(setting, name, arguments) for name in methods_of(setting, arguments)}
                if setting.model == "llama" and setting.answer < setting.length:
                    own["largest_tensor"] = probe(setting, "largest", arguments)
            write_results(arguments.output, results, table)


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["encoder", "llama"])
    parser.add_argument("--model_name_or_path", help="the encoder's weights; random ones by default")
    parser.add_argument("--batch", type=int, default=8, help="rows of a batch")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[16, 2], help="batches of one turn, for each model; peers take one"
    )
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--answer", type=int, default=32, help="tokens of its answer")
    parser.add_argument("--dim", type=int, default=1024, help="features")
    parser.add_argument("--rank", type=int, help="LoRA rank, 8 by default")
    parser.add_argument("--target_modules", nargs="+", help="LoRA target modules, all linear layers by default")
    parser.add_argument("--repetitions", type=int, default=3, help="turns")
    parser.add_argument("--slow_repetitions", type=int, default=2, help="turns of the slowest methods")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(DEFAULT_METHODS))
    parser.add_argument("--parts", nargs="+", choices=("time", "memory"), default=["time", "memory"])
    parser.add_argument("--quantization", choices=("nf4",), help="of the Llama")
    parser.add_argument("--peak_tflops", type=float, help="of the device, to state the share that is reached")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    add_machine_flags(parser, device=True)
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    if arguments.probe:
        print(json.dumps(run_probe(arguments)))
    else:
        run_parts(arguments)


if __name__ == "__main__":
    main()
