"""Do trl's `sft.py` and transformers' `run_glue.py` work with a trainer of ours after a change of at most five lines?

    python -m benchmarks.scripts.run OUTPUT --glue RUN_GLUE --sft SFT

RUN_GLUE is `examples/pytorch/text-classification/run_glue.py` of huggingface/transformers; SFT is `trl/scripts/sft.py`,
by default that of the installed trl. Each is run on small local models and datasets: as it is, and with the lines of
`edits.py`, over several datasets, and then what it has left is looked at.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trl

from hf_ensemble import PeftEnsembleModel

from ..common import ROOT, make_parser, read_results, write_results
from .edits import GLUE, SFT, changed_lines, edited
from .inputs import GLUE_SPLITS, LABELS, SKILLS, write_glue, write_sft
from .table import table

INSTALLED_SFT = Path(trl.__file__).parent / "scripts" / "sft.py"
QUICK = "--use_cpu --num_train_epochs 2 --per_device_train_batch_size 4 --learning_rate 0.01 --output_dir run"
SFT_FLAGS = (
    f"{QUICK} --config datasets.yaml --model_name_or_path base --dtype float32 --bf16 false --use_peft --lora_r 4 "
    "--lora_target_modules all-linear --eval_strategy epoch"
)
GLUE_FLAGS = f"{QUICK} --model_name_or_path base --max_seq_length 24 --do_train --do_eval --do_predict " + " ".join(
    f"--{split}_file {split}.json" for split in GLUE_SPLITS
)


def run_script(text: str, folder: Path, flags: str) -> list[str]:
    """Run a script in a folder, in a process of its own.

    Returns:
        `list[str]`: the last lines of what went wrong, none where it ended well.
    """
    path = folder / "script.py"
    path.write_text(text)
    caches = {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_MODULES_CACHE": str(folder / "modules")}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, path.name, *flags.split()],
        cwd=folder,
        env={**os.environ, **caches, **offline},
        capture_output=True,
        text=True,
    )
    return done.stderr.strip().splitlines()[-3:] if done.returncode else []


def left_by_sft(run: Path) -> dict[str, bool]:
    """What an `sft.py` over several datasets has to leave."""
    return {"trained": True, **_ensemble_of(run, set(SKILLS)), "card": (run / "README.md").is_file()}


def left_by_glue(run: Path) -> dict[str, bool]:
    """What a `run_glue.py` over several datasets has to leave."""
    results = {kind: _read(run / f"{kind}_results.json") for kind in ("train", "eval", "all")}
    state = _read(run / "trainer_state.json")
    predictions = [path.read_text().splitlines() for path in run.glob("predict_results_*.txt")]
    rows = len(LABELS["one"]) * GLUE_SPLITS["test"]
    return {
        "trained": {"train_loss", "train_runtime", "train_samples"} <= set(results["train"]),
        "log": any("train_loss" in entry for entry in state.get("log_history", [])),
        "evaluated": {"eval_loss", "eval_accuracy", "eval_samples"} <= set(results["eval"]),
        "predicted": [len(lines) for lines in predictions] == [rows + 1],
        # What `save_model()` writes without a folder.
        **_ensemble_of(run / "ensemble", set(LABELS["one"])),
        "card": (run / "ensemble" / "README.md").is_file(),
    }


def _ensemble_of(run: Path, tasks: set[str]) -> dict[str, bool]:
    """Whether what `save_model` wrote is an ensemble for the tasks that loads, with its tokenizer."""
    try:
        model = PeftEnsembleModel.from_pretrained(run)
    except Exception as error:  # whatever is missing or damaged
        return {f"saved ({type(error).__name__})": False}
    served = {task for member in model.members for task in member.tasks}
    return {"saved": served == tasks and (run / "tokenizer.json").is_file()}


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def measure(text: str, edits, write: Callable[[Path], None], flags: str, left: Callable[[Path], dict]) -> dict:
    """Run a script as it is and with its edits, each in a folder of its own."""
    new = edited(text, edits)
    found = {"sha256": hashlib.sha256(text.encode()).hexdigest()[:12], "changed_lines": changed_lines(text, new)}
    for name, own in (("as it is", text), ("edited", new)):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary).resolve()
            write(folder)
            errors = run_script(own, folder, flags)
            found[name] = {"errors": [line.replace(str(folder), "FOLDER") for line in errors]}
            if name == "edited" and not errors:
                found[name] |= left(folder / "run")
    return found


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--sft", type=Path, default=INSTALLED_SFT, help="trl's sft.py")
    parser.add_argument("--glue", type=Path, help="transformers' run_glue.py")
    arguments = parser.parse_args()
    results = {"scripts": {}, **read_results(arguments.output)}
    own = results["scripts"]
    own["sft.py"] = measure(arguments.sft.read_text(), SFT, write_sft, SFT_FLAGS, left_by_sft)
    if arguments.glue is not None:
        for name, labels in LABELS.items():
            own[f"run_glue.py, {name} set{'s' if name == 'several' else ''} of labels"] = measure(
                arguments.glue.read_text(), GLUE, partial(write_glue, labels=labels), GLUE_FLAGS, left_by_glue
            )
    write_results(arguments.output, results, table)


if __name__ == "__main__":
    main()
