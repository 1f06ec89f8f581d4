"""What does a boosting step gain for the group with the highest loss, and what does it cost?

    python -m benchmarks.boosting.run OUTPUT --suite classification [--steps 3] FLAGS
    python -m benchmarks.boosting.run OUTPUT --suite skills --output_dir OUT [--steps 3]

An ensemble is trained once: the adapter for all tasks, one adapter per group, weights. Each method of boosting then
adds its steps to a copy of that run; methods without training also make one step in gradients at an adapter of the
ensemble, in place of those at the start ("surrogate, adapter"). Reported are the group that was the worst before, by
training loss, and the mean over all tasks, on test rows, with the logits added up and with the adapters' deltas in the
weights; and the operations of the steps, kept or not, in percent of those of all trainings. `--continued` shows what
there is to gain for the worst group: its adapter is trained on, for so many times a whole training, and weighed as a
step is. FLAGS are those of `hf-ensemble fidelity`, and the skills those of the study `chain_of_thought`, whose
rationales are scored token by token.
"""

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, disable_progress_bars

from hf_ensemble import EnsembleSFTTrainer
from hf_ensemble.ensemble import EnsembleMember, PeftEnsembleModel
from hf_ensemble.ensemble.weighting.added_member import added_member
from hf_ensemble.estimate import LINEAR_METHODS
from hf_ensemble.models.usage import measured_usage
from hf_ensemble.runs import Boosting, BoostingStep, RunDirectory
from hf_ensemble.runs.boosting import START, with_step
from hf_ensemble.train.flows.assembly import EnsembleAssembly
from hf_ensemble.train.flows.boosting.held_out import added_answers
from hf_ensemble.train.flows.boosting.stage import EnsembleBoosting
from hf_ensemble.train.inputs.boosting import TRAINED_METHODS

from ..common import make_parser, read_results, shape_of, write_results
from ..skills import CORRUPTED, SKILLS, rows
from ..skills_trainer import pretrained, skills_ensemble
from ..trainers import trainer_from_flags
from .at_adapters import BoostingAtAdapters
from .table import table


def skills_trainer(settings, seed: int) -> tuple[EnsembleSFTTrainer, Mapping[str, Dataset]]:
    """The trainer over the generated skills, and their test rows."""
    names = [name for name in SKILLS if name not in CORRUPTED][: settings.skills]
    base = pretrained(Path(settings.output_dir) / "base", settings.pretraining_rows)
    splits = {
        split: {name: rows(name, count, f"{split}{seed}") for name in names}
        for split, count in (("train", settings.rows), ("validation", 100), ("test", 200))
    }
    test = splits.pop("test")
    folder, options = Path(settings.output_dir) / f"skills-{seed}", {"num_groups": settings.num_groups}
    return skills_ensemble(base, folder, seed, splits, num_train_epochs=settings.epochs, **options), test


class Boosted:
    """A trained ensemble, and copies of its run that are boosted.

    Args:
        trainer (`EnsembleTrainer` or `EnsembleSFTTrainer`): trains the ensemble, unless its run is finished.
        test (`dict[str, Dataset]`): test rows of each task.
        test_rows (`int`): number of them that are scored, at most.
    """

    def __init__(self, trainer, test: Mapping[str, Dataset], test_rows: int):
        trainer.train()
        self.trainer, self.flow = trainer, trainer.flow
        self.training_flops = sum(own.flops for own in self.flow.trainings())
        context = self.flow.context
        some = {name: own.select(range(min(len(own), test_rows))) for name, own in trainer.prepare_rows(test).items()}
        self.test = {name: context.model_columns(own) for name, own in some.items()}
        self.before = self.scores(trainer.ensemble)

    def scores(
        self, ensemble: PeftEnsembleModel, combination: str = "logits", tasks: Sequence[str] | None = None
    ) -> dict[str, dict[str, float]]:
        """Test loss and accuracy of each task."""
        tables = {task: own for task, own in self.test.items() if tasks is None or task in tasks}
        if not tables:
            return {}
        ensemble.combination = combination
        try:
            scored = self.flow.evaluation.score_ensemble(ensemble, tables)
        finally:
            ensemble.combination = "logits"
        return {task: {"loss": own.loss, "accuracy": own.accuracy} for task, own in scored.items()}

    def boost(self, method: str, num_rows: int, settings) -> dict[str, Any]:
        """The steps of a method, made from so many rows of a task, and the scores with them."""
        flow, run, label = self.flow, self.flow.context.run, method
        method, _, where = method.partition(", ")
        folder = run.path.with_name(f"{run.path.name}-{method}-{where or 'start'}-{num_rows}-{settings.target}")
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(run.path, folder, ignore=shutil.ignore_patterns(run.gradients.name))
        (folder / run.gradients.name).symlink_to(run.gradients.resolve(), target_is_directory=True)
        args = copy.copy(flow.context.args)
        # Steps at adapters would begin at several.
        args.boosting_steps = 1 if where else settings.steps
        args.boosting_method, args.boosting_target = method, settings.target
        context = replace(flow.context, run=RunDirectory(folder), args=args)
        training = copy.copy(flow.training)
        training.context = context
        assembly = EnsembleAssembly(context, flow.grouping)
        count = flow.num_calibration_runs()
        with context.model_state.restored():
            given = self.trainer.ensemble
            members, weights, scales = given.members, given.weights, given.scales
            before = assembly.ensemble(members, weights, scales)
            kind = partial(BoostingAtAdapters, num_rows=num_rows) if where else EnsembleBoosting
            boosting = kind(
                context, training, assembly, flow.grouping, lambda: flow.calibration.selector(count).estimator
            )
            after = boosting.run(before)
            found = context.run.read(Boosting)
            # The others are answered as before.
            boosted = list(dict.fromkeys(task for step in found.kept for task in step.tasks))
            result = {
                "method": label,
                "step_rows": num_rows if where else None,
                "target": settings.target,
                "steps": [asdict(step) for step in found.steps],
                "after": self.before | self.scores(after, tasks=boosted),
                "after_as_weights": self.scores(after, "weights", boosted),
            }
            if where == "adapter" and settings.continued and num_rows == settings.step_rows[0]:
                result["continued"] = self.continued(boosting, before, found.steps[0], settings.continued)
            # The adapters of the ensemble that other methods begin with are put back.
            self.flow.ensemble = EnsembleAssembly(flow.context, flow.grouping).ensemble(members, weights, scales)
        return result

    def continued(
        self, boosting: BoostingAtAdapters, ensemble: PeftEnsembleModel, step: BoostingStep, lengths: Sequence[float]
    ) -> list[dict[str, Any]]:
        """Trainings on a step's tasks from the adapter that it begins at, as steps, and the scores with them."""
        found, tasks = [], list(step.tasks)
        context, training = boosting.context, boosting.training
        boosting.begin_at(boosting.start_of(ensemble, step.target))
        tables = {task: context.eval_tables[task] for task in tasks}
        for number, length in enumerate(lengths):
            name = f"continued_{number}"
            with measured_usage() as usage:
                training.run(name, tasks, context.run.member(name), start=context.run.member(START), length=length)
            members = [*boosting._members(ensemble, tasks), EnsembleMember(name, tasks, is_step=True)]
            weights = {task: ensemble.weights[task] for task in tasks}
            trial = boosting.assembly.ensemble(members, weights, ensemble.scales)
            added = added_member(added_answers(context, trial, {name: 1.0, START: -1.0}, tables))
            trial.weights = {
                task: with_step(row, name, added.weight / ensemble.scales.get(task, 1.0))
                for task, row in weights.items()
            }
            found.append(
                {
                    "length": length,
                    "flops": usage.flops,
                    "weight": added.weight,
                    "validation_loss": added.loss_before,
                    "validation_loss_after": added.loss,
                    "gain": added.gain,
                    "standard_error": added.standard_error,
                    "after": self.before | self.scores(trial, tasks=tasks),
                }
            )
        return found


def measure(trainer, test: Mapping[str, Dataset], settings) -> dict[str, Any]:
    boosted = Boosted(trainer, test, settings.test_rows)
    results = []
    for method, num_rows in product(settings.methods, settings.step_rows):
        if num_rows != settings.step_rows[0] and ", " not in method:
            continue
        results.append(boosted.boost(method, num_rows, settings))
        worst = results[-1]["steps"][0]["tasks"]
        print(method, worst, *(mean(results[-1]["after"], worst, what) for what in ("loss", "accuracy")), flush=True)
    return {
        "groups": boosted.flow.grouping.groups,
        "training_flops": boosted.training_flops,
        "before": boosted.before,
        "methods": results,
    }


def mean(scores: Mapping[str, Mapping[str, float]], tasks: Sequence[str], measure: str) -> float:
    return float(np.mean([scores[task][measure] for task in tasks]))


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--suite", choices=("classification", "skills"), required=True)
    methods = [*LINEAR_METHODS, *(f"{method}, adapter" for method in LINEAR_METHODS), *TRAINED_METHODS]
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--step_rows", type=int, nargs="+", default=[100], help="rows of a task for a step at adapters")
    parser.add_argument("--continued", type=float, nargs="*", default=[], help="lengths of the trainings that go on")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--test_rows", type=int, default=10_000, help="test rows of each task, at most")
    parser.add_argument("--target", default="group", choices=("group", "task"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the skills")
    parser.add_argument("--skills", type=int, default=10, help="number of skills")
    parser.add_argument("--rows", type=int, default=100, help="training rows of each skill")
    parser.add_argument("--num_groups", type=int, help="number of groups of skills; chosen by default")
    parser.add_argument("--epochs", type=float, default=3, help="of each training on skills")
    parser.add_argument("--pretraining_rows", type=int, default=120_000)
    settings, flags = parser.parse_known_args()
    disable_progress_bars()
    worlds = []
    if settings.suite == "classification":
        trainer, tasks = trainer_from_flags(flags)
        worlds.append((trainer.args.seed, trainer, tasks.split("test")))
    else:
        skills = make_parser(__file__, __doc__)
        skills.add_argument("--output_dir", required=True)
        settings.output_dir = skills.parse_args([settings.output, *flags]).output_dir
        worlds += [(seed, *skills_trainer(settings, seed)) for seed in settings.seeds]
    found = [{"seed": seed, **measure(trainer, test, settings)} for seed, trainer, test in worlds]
    kept = read_results(settings.output)
    suites = {**kept.get("suites", {}), settings.suite: {"shape": shape_of(settings, "output_dir"), "worlds": found}}
    write_results(settings.output, {**kept, "suites": suites}, table)


if __name__ == "__main__":
    main()
