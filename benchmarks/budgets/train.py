"""Trains every adapter that the systems are made of, and keeps what each says of the validation and test rows.

    python -m benchmarks.budgets.train OUT --rows 150 --seed 0 [--worker 1] FLAGS

FLAGS are those of `hf-ensemble fidelity`, without `--output_dir`. With `--max_epochs`, the recipe's number of epochs is
that after which the validation loss of one adapter for all tasks stops falling. The first process draws the tasks'
rows, trains the adapter for all tasks, captures the gradients and lists the trainings; it and any number of processes
with other `--worker` numbers then take one training after another from the list. What is finished is not made again;
of a killed process, delete the training's file in OUT/claims. `--systems` trains some systems alone, each by its label
in the results, and `--choices` also those of the study `choices`.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from hf_ensemble._compat import package_versions
from hf_ensemble._files import write_json
from hf_ensemble.ensemble import PeftEnsembleModel
from hf_ensemble.ensemble.merging.merge import merge_adapters
from hf_ensemble.ensemble.weighting.collector import AnswerCollector
from hf_ensemble.runs import run_selector
from hf_ensemble.runs.systems import BASELINE
from hf_ensemble.select import DataSelector
from hf_ensemble.select.settings import LENGTHS
from hf_ensemble.train.comparison.adapters import loaded_adapters, train_widened
from hf_ensemble.train.flows.capturing import gradients_at_baseline

from ..choices.ensembles import Chooser
from ..common import drawn_tasks, machine, make_parser
from ..trainers import flag_value, train_baseline, trainer_from_flags
from .systems import SYSTEMS, Part, SystemBuilder, needs, parts_of, parts_without_choice

PLAN, EPOCHS, CHOICES = "plan.json", "epochs.json", "choices.json"
# Rows of a task that weights are fitted to.
VALIDATION_ROWS = 100
MEMBER, TARGETS = "member", "targets"


def validation_curve(folder: Path, flags: list[str], max_epochs: int) -> list[float]:
    """Validation loss of one adapter for all tasks, mean over the tasks, after each of `max_epochs` epochs."""
    more = ["--num_train_epochs", str(max_epochs), "--eval_strategy", "epoch", "--output_dir", str(folder / "epochs")]
    trainer, _ = trainer_from_flags([*flags, "--data", str(folder / "tasks"), *more])
    with trainer.working():
        run = trainer.run_directory
        trained = trainer.flow.training.run(BASELINE, list(trainer.tasks), run.baseline)
    losses: dict[float, list[float]] = {}
    for entry in trained.log_history:
        own = [value for key, value in entry.items() if key.startswith("eval_") and key.endswith("_loss")]
        losses.setdefault(entry["epoch"], []).extend(own)
    return [float(np.mean(own)) for own in losses.values() if own]


class Worker:
    """Makes parts and keeps their outputs.

    Args:
        folder (`Path`): of the study; shared by all processes.
        number (`int`): of this process; 0 plans.
        flags (`list[str]`): those of the trainer.
        wanted (`list[str]`, *optional*): labels of the systems to train beside one adapter for all; all by default.
    """

    def __init__(self, folder: Path, number: int, flags: list[str], wanted: list[str] | None = None):
        self.folder, self.wanted = folder, wanted
        flags = [*flags, "--data", str(folder / "tasks"), "--output_dir", str(folder / f"run-{number}")]
        self.trainer, self.tasks = trainer_from_flags(flags)
        self.trainer.open_run()
        self.flow = self.trainer.flow
        context = self.flow.context
        test = self.trainer.prepare_rows(self.tasks.split("test"))
        self.tables = {
            "validation": context.eval_tables,
            "test": {name: context.model_columns(rows) for name, rows in test.items()},
        }
        for name in ("claims", "parts", "outputs"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    @property
    def baseline(self) -> Path:
        return self.folder / "run-0" / "baseline"

    def plan(self) -> None:
        """Train the adapter for all tasks, capture, choose, and write the list of systems and trainings."""
        trainer, flow, run = self.trainer, self.flow, self.trainer.run_directory
        begin = time.time()
        train_baseline(trainer)
        with trainer.working():
            gradients_at_baseline(flow.context, flow.training)
        captured = time.time()

        systems = SystemBuilder(trainer.selector(), self._going_on, trainer.args.seed)(self.wanted)
        chosen = time.time()
        parts = parts_of(systems)
        plan = {
            "tasks": list(trainer.tasks),
            "train_rows": {name: len(rows) for name, rows in trainer.tasks.split("train").items()},
            "steps": run.trained_adapter(BASELINE).global_step,
            "machine": machine(str(flow.context.model.device)),
            "versions": package_versions(),
            "seconds": {"trained and captured": captured - begin, "chosen": chosen - captured},
            "parts": {name: asdict(part) for name, part in parts.items()},
            "systems": [
                {
                    "label": one.label,
                    "cost": one.cost,
                    "parts": [part.name for part in one.parts],
                    "own": {task: one.parts[number].name for task, number in one.own.items()},
                    "predicted": one.predicted,
                    "together": one.together,
                }
                for one in systems
            ],
        }
        write_json(self.folder / PLAN, plan)

    def _going_on(self, lengths: Sequence[float]) -> DataSelector:
        """Predicts trainings of these lengths that go on from the adapter for all tasks."""
        length, *others = lengths
        options = {"continued_length": length, "other_lengths": others}
        args = self.trainer.args
        return run_selector(self.trainer.run_directory, list(self.trainer.tasks), args.num_components, [], **options)

    def add_choices(self, budget: float) -> None:
        """Add what the ensembles of `benchmarks.choices` are made of to the plan, and list them beside it."""
        chooser = Chooser(self._going_on(LENGTHS), goes_on=True, output_scales=True)
        seed, everything = self.trainer.args.seed, Part(dict.fromkeys(self.trainer.tasks, 1.0))
        made = {
            "baseline": [chooser.together()],
            "choices": chooser.random_choices(seed),
            "chosen": [chooser.chosen(budget)],
            "others": chooser.rivals(budget, seed),
        }
        plan = json.loads((self.folder / PLAN).read_text())
        listed: dict[str, list[dict]] = {}
        for kind, ensembles in made.items():
            for one in ensembles:
                parts = [Part(own, length, goes_on=True) for own, length in zip(one.mixtures, one.lengths)]
                # The last one serves where none of the others does.
                parts.append(everything)
                plan["parts"] |= {part.name: asdict(part) for part in parts if part.name not in plan["parts"]}
                listed.setdefault(kind, []).append({**asdict(one), "parts": [part.name for part in parts]})
        write_json(self.folder / PLAN, plan)
        write_json(self.folder / CHOICES, {"budget": budget, "ensembles": listed})

    def work(self, awaited: str = PLAN) -> None:
        """Make parts until none is left; first those that no prediction chooses, while others are chosen.

        The list is whole once the file `awaited` is there.
        """
        while not (self.baseline / "adapter_config.json").exists():
            time.sleep(1)
        with self.trainer.working():
            self._make_all(parts_without_choice(list(self.trainer.tasks), self.trainer.args.seed, self.wanted))
            while not (self.folder / awaited).exists():
                time.sleep(1)
            plan = json.loads((self.folder / PLAN).read_text())
            self._make_all({name: Part(**values) for name, values in plan["parts"].items()})

    def _make_all(self, parts: dict[str, Part]) -> None:
        left = list(parts)
        while left:
            # Those that wait for others come later.
            made = {path.stem for path in (self.folder / "outputs").glob("*.npz")}
            ready = [name for name in left if made.issuperset(needs(parts[name], parts))]
            if not ready:
                time.sleep(1)
            for name in ready[:1]:
                left.remove(name)
                if self._claims(name):
                    begin = time.time()
                    folder = self.make(parts[name])
                    trained = time.time()
                    self.keep_outputs(parts[name], folder)
                    print(name, round(trained - begin, 1), round(time.time() - trained, 1), flush=True)

    def _claims(self, name: str) -> bool:
        try:
            os.close(os.open(self.folder / "claims" / name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def make(self, part: Part) -> Path:
        """Train or merge a part; returns where its adapter lies."""
        folder, context = self.folder / "parts" / part.name, self.flow.context
        if part.merging:
            return self._merge(part, folder)
        everything = dict.fromkeys(self.trainer.tasks, 1.0)
        if part.name == Part(everything).name:
            return self.baseline
        options = {
            "seed": context.args.seed + 1000 * part.seed,
            "start": self._start_of(part),
            "length": part.length,
        }
        if part.widening > 1:
            train_widened(self.flow, part.widening, part.name, part.mixture, folder, **options)
        else:
            self.flow.training.run(part.name, part.mixture, folder, **options)
        return folder

    def _start_of(self, part: Part) -> Path | None:
        """The adapter for all tasks that a training goes on from, of the training's own rank."""
        if not part.goes_on:
            return None
        wide = Part(dict.fromkeys(self.trainer.tasks, 1.0), widening=part.widening)
        return self.baseline if part.widening == 1 else self.folder / "parts" / wide.name

    def _merge(self, part: Part, folder: Path) -> Path:
        model, names = self.flow.context.model, {name: f"merged_{name}" for name in part.mixture}
        with loaded_adapters(self.flow, {own: self.folder / "parts" / name for name, own in names.items()}):
            weights = {names[name]: weight for name, weight in part.mixture.items()}
            merge_adapters(model, weights, method=part.merging).save_pretrained(folder)
        return folder

    def keep_outputs(self, part: Part, folder: Path) -> None:
        """Write the log-probabilities of each task's labels on its validation and test rows, `(rows, labels)`."""
        tasks = list(part.mixture) if part.is_own else list(self.trainer.tasks)
        context, found, targets = self.flow.context, {}, {}
        with loaded_adapters(self.flow, {MEMBER: folder}):
            ensemble = PeftEnsembleModel(context.model, [MEMBER], label_space=context.label_space)
            ensemble.eval()
            collect = AnswerCollector(
                ensemble, context.data_collator, 128, 2**27, None, 0, False, context.mixed_precision
            )
            for split, tables in self.tables.items():
                for task in tasks:
                    answers = collect(task, tables[task])
                    values = answers.values[0].double().log_softmax(-1)
                    labels = values.isfinite().any(0)
                    found[f"{split}/{task}"] = values[:, labels].numpy().astype(np.float16)
                    targets[f"{split}/{task}"] = (labels.cumsum(0)[answers.targets] - 1).numpy().astype(np.int16)
        if folder == self.baseline:
            self._write_arrays(TARGETS, targets)
        self._write_arrays(part.name, found)

    def _write_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        file = self.folder / "outputs" / f"{name}.npz"
        partial = file.with_suffix(".part")
        with partial.open("wb") as open_file:
            np.savez_compressed(open_file, **arrays)
        partial.replace(file)


def main() -> None:
    parser = make_parser(__file__, __doc__, output=False)
    parser.add_argument("folder", type=Path, help="folder of the trainings and their outputs")
    parser.add_argument("--rows", type=int, default=150, help="training rows per task")
    parser.add_argument("--seed", type=int, default=0, help="of the rows that are drawn and of the trainings")
    parser.add_argument("--max_epochs", type=int, help="choose the number of epochs up to this one")
    parser.add_argument("--worker", type=int, default=0, help="number of this process")
    parser.add_argument(
        "--systems", nargs="+", metavar="LABEL", choices=SYSTEMS, help="train these beside one adapter for all"
    )
    parser.add_argument(
        "--choices", type=float, metavar="BUDGET", help="also train the ensembles of `benchmarks.choices`"
    )
    own, flags = parser.parse_known_args()
    data = Path(flag_value(flags, "--data"))
    passed = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    passed.add_argument("--data")
    flags = [*passed.parse_known_args(flags)[1], "--seed", str(own.seed)]
    if own.worker == 0 and not (own.folder / "tasks").is_dir():
        limits = {"train": own.rows, "validation": VALIDATION_ROWS}
        drawn_tasks(data, own.folder / "tasks.part", limits, own.seed).rename(own.folder / "tasks")
    if own.max_epochs and own.worker == 0 and not (own.folder / EPOCHS).exists():
        write_json(own.folder / EPOCHS, validation_curve(own.folder, flags, own.max_epochs))
    while not (own.folder / (EPOCHS if own.max_epochs else "tasks")).exists():
        time.sleep(1)
    if own.max_epochs:
        curve = json.loads((own.folder / EPOCHS).read_text())
        flags += ["--num_train_epochs", str(int(np.argmin(curve)) + 1)]
    worker = Worker(own.folder, own.worker, flags, own.systems)
    if own.worker == 0 and not (own.folder / PLAN).exists():
        worker.plan()
    if own.worker == 0 and own.choices and not (own.folder / CHOICES).exists():
        worker.add_choices(own.choices)
    worker.work(CHOICES if own.choices else PLAN)


if __name__ == "__main__":
    main()
