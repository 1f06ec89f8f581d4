"""What does a boosting step gain for the group with the highest loss, and what does it cost?

    python -m benchmarks.boosting.run OUTPUT --suite classification [--steps 3] FLAGS
    python -m benchmarks.boosting.run OUTPUT --suite skills --output_dir OUT [--steps 3]

An ensemble is trained once: the adapter for all tasks, one adapter per group, fitted weights. Each method of boosting
then adds its steps to a copy of that run. Reported are the group that was the worst before (by training loss) and the
mean over all tasks, on test rows, with the logits added up and with the adapters' deltas in the weights; and the
operations of the steps, kept or not, in percent of those of all trainings. FLAGS are those of `hf-ensemble fidelity`,
and the skills those of the study `chain_of_thought`, whose rationales are scored token by token.
"""

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig

from hf_ensemble import EnsembleSFTConfig, EnsembleSFTTrainer
from hf_ensemble.ensemble import PeftEnsembleModel
from hf_ensemble.runs import Boosting, RunDirectory
from hf_ensemble.train.flows.assembly import EnsembleAssembly
from hf_ensemble.train.flows.boosting.stage import EnsembleBoosting
from hf_ensemble.train.inputs.boosting import METHODS

from ..chain_of_thought.run import pretrained
from ..common import make_parser, read_results, shape_of, write_results
from ..skills import CORRUPTED, SKILLS, rows
from ..trainers import trainer_from_flags
from .table import table


def skills_trainer(settings, seed: int) -> tuple[EnsembleSFTTrainer, Mapping[str, Dataset]]:
    """The trainer over the generated skills, and their test rows."""
    names = [name for name in SKILLS if name not in CORRUPTED][: settings.skills]
    base = pretrained(Path(settings.output_dir) / "base", settings.pretraining_rows)
    splits = {
        split: {name: rows(name, count, f"{split}{seed}") for name in names}
        for split, count in (("train", settings.rows), ("validation", 100), ("test", 200))
    }
    args = EnsembleSFTConfig(
        output_dir=str(Path(settings.output_dir) / f"skills-{seed}"),
        projection_dim=None,
        num_groups=settings.num_groups,
        num_train_epochs=settings.epochs,
        learning_rate=1e-3,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=100,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=seed,
    )
    trainer = EnsembleSFTTrainer(
        model=str(base),
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    return trainer, splits["test"]


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

    def scores(self, ensemble: PeftEnsembleModel, combination: str = "logits") -> dict[str, dict[str, float]]:
        """Test loss and accuracy of each task."""
        ensemble.combination = combination
        try:
            scored = self.flow.evaluation.score_ensemble(ensemble, self.test)
        finally:
            ensemble.combination = "logits"
        return {task: {"loss": own.loss, "accuracy": own.accuracy} for task, own in scored.items()}

    def boost(self, method: str, steps: int, target: str) -> dict[str, Any]:
        """The steps of a method, and the scores with them."""
        flow, run = self.flow, self.flow.context.run
        folder = run.path.with_name(f"{run.path.name}-{method}-{target}")
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(run.path, folder, ignore=shutil.ignore_patterns(run.gradients.name))
        (folder / run.gradients.name).symlink_to(run.gradients.resolve(), target_is_directory=True)
        args = copy.copy(flow.context.args)
        args.boosting_steps, args.boosting_method, args.boosting_target = steps, method, target
        context = replace(flow.context, run=RunDirectory(folder), args=args)
        training = copy.copy(flow.training)
        training.context = context
        assembly = EnsembleAssembly(context, flow.grouping)
        count = flow.num_calibration_runs()
        with context.model_state.restored():
            given = self.trainer.ensemble
            members, weights, scales = given.members, given.weights, given.scales
            before = assembly.ensemble(members, weights, scales)
            boosting = EnsembleBoosting(
                context, training, assembly, flow.grouping, lambda: flow.calibration.selector(count).estimator
            )
            after = boosting.run(before)
            found = context.run.read(Boosting)
            result = {
                "method": method,
                "target": target,
                "steps": [asdict(step) for step in found.steps],
                "after": self.scores(after),
                "after_as_weights": self.scores(after, "weights"),
            }
            # The adapters of the ensemble that other methods begin with are put back.
            self.flow.ensemble = EnsembleAssembly(flow.context, flow.grouping).ensemble(members, weights, scales)
        return result


def measure(trainer, test: Mapping[str, Dataset], settings) -> dict[str, Any]:
    boosted = Boosted(trainer, test, settings.test_rows)
    results = []
    for method in settings.methods:
        results.append(boosted.boost(method, settings.steps, settings.target))
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
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
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
