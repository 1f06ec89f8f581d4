"""How many of trl's own tests of `SFTTrainer` pass when the trainer is `EnsembleSFTTrainer`?

    python -m benchmarks.trl_suite.run OUTPUT --trl TRL

TRL is a checkout of huggingface/trl, of which only `tests/` is read: the library under its tests is the installed one.
The tests run on the CPU and without a network, on stand-ins for the models and datasets that they name, in three modes:
with trl's own classes (`parent`, the reference), with the trainer and its configuration replaced (`single`), and with
each dataset also cut into a dict of two (`several`). To see why a test fails:

    python -m benchmarks.trl_suite.run OUTPUT --trl TRL --modes single --only test_eval_packing --tracebacks
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..common import ROOT, make_parser, read_results, write_results
from .inputs import write_inputs
from .table import MODES, table

TESTS = "tests/test_sft_trainer.py"
CLASS = "TestSFTTrainer"
SECONDS_PER_TEST = 180


def checked_out(checkout: Path) -> dict[str, str]:
    """What identifies the tests: their commit where the folder knows it, and a digest of the file."""
    digest = hashlib.sha256((checkout / TESTS).read_bytes()).hexdigest()[:12]
    asked = subprocess.run(
        ["git", "-C", checkout, "log", "-1", "--format=%h of %cs", "--", TESTS], capture_output=True, text=True
    )
    return {"file": TESTS, "sha256": digest, "commit": asked.stdout.strip() or "unknown"}


def environment(inputs: Path) -> dict[str, str]:
    """Variables with which the Hub's libraries find the stand-ins, and nothing else."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    return {
        **kept,
        "HF_HOME": str(inputs),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }


def run_tests(checkout: Path, mode: str, folder: Path, only: str | None, tracebacks: bool) -> dict[str, dict]:
    """Run the tests in one mode, in a process of its own.

    Args:
        checkout (`Path`): a checkout of trl.
        mode (`str`): one of `MODES`.
        folder (`Path`): holds `inputs`; the tests write below it.
        only (`str`, *optional*): pytest's `-k`.
        tracebacks (`bool`): whether to print what went wrong.

    Returns:
        `dict[str, dict]`: by test, `outcome` and the `reason` if it did not pass.
    """
    report, settings, inputs = folder / f"{mode}.json", folder / "pytest.ini", folder / "inputs"
    # The checkout's own settings are for its own runs.
    settings.write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", f"{checkout / TESTS}::{CLASS}", "-p", f"{__package__}.plugin"]
    command += ["-p", "no:cacheprovider", "-c", settings, "--rootdir", checkout, "--basetemp", folder / mode]
    command += [f"--timeout={SECONDS_PER_TEST}", "--disable-warnings", "-q", f"--tb={'short' if tracebacks else 'no'}"]
    command += ["--suite_mode", mode, "--suite_inputs", inputs, "--suite_report", report]
    command += ["-k", only] if only else []
    done = subprocess.run(command, cwd=folder, env=environment(inputs))
    # All passed, or some failed.
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest could not run the tests in mode {mode!r}: it ended with {done.returncode}")
    return json.loads(report.read_text())


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--trl", type=Path, required=True, help="checkout of huggingface/trl")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="others keep their results")
    parser.add_argument("--only", help="run the tests that match this expression, as in pytest's -k")
    parser.add_argument("--tracebacks", action="store_true", help="print why tests fail")
    arguments = parser.parse_args()
    checkout = arguments.trl.resolve()
    results = {"seconds": {}, "modes": {}, **read_results(arguments.output), "tests": checked_out(checkout)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        write_inputs(folder / "inputs")
        for mode in arguments.modes:
            start = time.perf_counter()
            outcomes = run_tests(checkout, mode, folder, arguments.only, arguments.tracebacks)
            results["modes"][mode] = {**(results["modes"].get(mode, {}) if arguments.only else {}), **outcomes}
            results["seconds"][mode] = round(time.perf_counter() - start)
    write_results(arguments.output, results, table)


if __name__ == "__main__":
    main()
