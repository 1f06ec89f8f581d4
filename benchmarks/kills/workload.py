"""A small run of every stage, as the process that is killed and started again.

    python -m benchmarks.kills.workload ensemble FOLDER

FOLDER holds the base model in `base`; the run goes to `run`, the log to `log.json` and what `save_model` writes to
`saved`. With `--events` every change of a file is listed, and with `--kill_at` the process kills itself before one.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import LoraConfig

from hf_ensemble import EnsembleSFTConfig, EnsembleSFTTrainer, SelectionSFTConfig, SelectionSFTTrainer
from hf_ensemble.train import collect_results

from ..skills import rows

FLOWS = ("ensemble", "selection")
TASKS = ("two_step_addition", "one_step_addition", "wrong_rationales", "reversal")
# Before the run's own record is there, and after its last stage.
FIRST, LAST = "imports", "evaluation"
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


def make_trainer(flow: str, folder: Path) -> EnsembleSFTTrainer | SelectionSFTTrainer:
    """A trainer with packing, dropout, checkpoints, calibration and evaluations; its groups start again."""
    settings = {
        "output_dir": str(folder / "run"),
        "projection_dim": 64,
        "num_components": 10,
        "calibration_runs": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "packing": True,
        "max_length": 64,
        "eval_strategy": "epoch",
        "logging_steps": 1,
        "save_strategy": "steps",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    splits = {
        split: {name: rows(name, count, split) for name in TASKS}
        for split, count in (("train", 8), ("validation", 4), ("test", 4))
    }
    datasets = {name: {split: own[name] for split, own in splits.items()} for name in TASKS}
    given = {
        "model": str(folder.parent / "base"),
        "train_dataset": datasets,
        "peft_config": LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"),
    }
    if flow == "ensemble":
        args = EnsembleSFTConfig(**settings, save_steps=1, num_groups=2, affinity_subsets=20)
        return EnsembleSFTTrainer(args=args, **given)
    args = SelectionSFTConfig(**settings, save_steps=2, save_total_limit=2, meta_initialization=True, max_auxiliary=2)
    return SelectionSFTTrainer(args=args, target=TASKS[0], **given)


def current_stage(run: Path) -> str:
    """The stage that was begun last in a run, as its record says."""
    try:
        stages = json.loads((run / "run.json").read_text())["stages"]
    except FileNotFoundError:
        return FIRST
    begun = [name for name, stage in stages.items() if stage["status"] == "begun"] or list(stages) or [FIRST]
    is_done = stages.get(begun[-1], {}).get("status") == "done"
    return LAST if is_done and begun[-1] in ("weights", "adapter") else begun[-1]


@contextmanager
def watched_files(folder: Path, events: Path | None, kill_at: int | None) -> Iterator[None]:
    """List every change of a file below a folder with the run's stage, and kill this process before one of them."""
    is_open, count = True, 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        opens = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not is_open or not (opens or event in _CHANGES) or isinstance(arguments[0], int):
            return
        # The last path is what the file will be.
        path = os.fsdecode(arguments[1] if event == "os.rename" else arguments[0])
        if not path.startswith(str(folder / "run")) and not path.startswith(str(folder / "saved")):
            return
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        if events is not None:
            line = {"event": event, "path": os.path.relpath(path, folder), "stage": current_stage(folder / "run")}
            with os.fdopen(os.open(events, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a") as file:
                file.write(json.dumps(line) + "\n")

    sys.addaudithook(watch)
    try:
        yield
    finally:
        is_open = False


def work(flow: str, folder: Path, events: Path | None = None, kill_at: int | None = None) -> None:
    """Make the run, or go on with it, and write what the process has seen of it."""
    with watched_files(folder, events, kill_at):
        trainer = make_trainer(flow, folder)
        output = trainer.train()
        collect_results(trainer)
        trainer.save_model(str(folder / "saved"))
    log = {"loss": output.training_loss, "metrics": output.metrics, "history": trainer.state.log_history}
    (folder / "log.json").write_text(json.dumps(log, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flow", choices=FLOWS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--events", type=Path, help="file that gets a line for each change of a file")
    parser.add_argument("--kill_at", type=int, help="number of the change before which the process kills itself")
    arguments = parser.parse_args()
    work(arguments.flow, arguments.folder.resolve(), arguments.events, arguments.kill_at)


if __name__ == "__main__":
    main()
