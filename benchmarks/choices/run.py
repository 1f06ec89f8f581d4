"""Are ensembles as good as predicted, and is the one that is chosen the best that could have been?

    python -m benchmarks.choices.run OUTPUT [--budget 2] [--folder FOLDER]    # on the demo's generated world
    python -m benchmarks.choices.run OUTPUT [--budget 2] --config FILE ...     # flags of `hf-ensemble fidelity`
    python -m benchmarks.choices.run OUTPUT --trained OUT/short-150-0 ...      # folders of `benchmarks.budgets.train`

Ten choices of mixtures with a random number of groups and a random budget are trained, and the mean loss of each
ensemble, every task served as it was chosen, is compared with the predicted and the expected one. Then the choice
within a budget, and the same made anew after each training, are compared with twenty other ensembles of at most this
cost, all trained: partitions, mixtures of another number and random ones. The one adapter for all tasks belongs to
every ensemble and has calibrated the predictions. Losses are of the validation rows, which the search has seen, and of
test rows. Every mixture is trained once, and stays in the run.

In folders that were trained with `--choices BUDGET`, mixtures go on from the adapter for all tasks, and losses are what
is left with the most probable scale of each task's outputs, found on its validation rows.
"""

from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from hf_ensemble import TaskSet
from hf_ensemble.cli.demo.flow import base_model, demo_trainer
from hf_ensemble.cli.demo.world import build_world
from hf_ensemble.estimate import ObservedRun
from hf_ensemble.runs import run_selector
from hf_ensemble.runs.systems import BASELINE

from ..common import make_parser, write_results
from ..trainers import train_baseline, trainer_from_flags
from .ensembles import Chooser, Ensemble
from .table import table
from .trained import of_folder


class Truth:
    """Trains mixtures and scores them, in a trainer's run."""

    def __init__(self, trainer, tasks: TaskSet):
        self._flow, self._names = trainer.flow, list(tasks.names)
        context = self._flow.context
        rows = trainer.prepare_rows(tasks.split("test"))
        self._tables = {
            "validation": context.eval_tables,
            "test": {name: context.model_columns(own) for name, own in rows.items()},
        }
        self._known: dict[str, dict[str, dict[str, float]]] = {}

    def losses(self, mixture: dict[str, float]) -> dict[str, dict[str, float]]:
        """Loss of every task with the adapter that was trained on a mixture, by split."""
        weights = sorted((name, round(own, 4)) for name, own in mixture.items())
        name = f"choice-{blake2b(repr(weights).encode(), digest_size=6).hexdigest()}"
        run = self._flow.context.run
        folder = Path(run.path) / "choices" / name
        if weights == sorted((name, 1.0) for name in self._names):
            name, folder = BASELINE, run.baseline
        if name not in self._known:
            self._flow.training.run(name, mixture, folder)
            self._known[name] = {
                split: {
                    task: one.loss for task, one in self._flow.evaluation.score_adapter(folder, rows, split).items()
                }
                for split, rows in self._tables.items()
            }
        return self._known[name]

    def of(self, ensemble: Ensemble) -> dict[str, float]:
        """Mean true loss, each task served as chosen, and by the adapter with the least validation loss."""
        parts = [self.losses(own) for own in [*ensemble.mixtures, dict.fromkeys(self._names, 1.0)]]
        best = {task: min(parts, key=lambda part: part["validation"][task]) for task in self._names}
        return {
            **{
                split: float(np.mean([parts[ensemble.serving[task]][split][task] for task in self._names]))
                for split in self._tables
            },
            "test_reassigned": float(np.mean([best[task]["test"][task] for task in self._names])),
        }


def one_after_the_other(trainer, truth: Truth, budget: float) -> Ensemble:
    """The choice within a budget when what is left is chosen anew after each training, as the trainers do."""
    run, names = trainer.run_directory, list(trainer.tasks)
    everything = dict.fromkeys(names, 1.0)
    observed = [ObservedRun(everything, truth.losses(everything)["validation"])]
    trained: dict[str, ObservedRun] = {}
    while True:
        selector = run_selector(run, names, trainer.args.num_components, [*observed, *trained.values()])
        options = {"compute_budget": budget, "trained": trained, "output_scales": False}
        grouping = selector.group(None, "mixtures", **options)
        left = [name for name in grouping.groups if name not in trained and name != grouping.baseline_group]
        if not left:
            return Chooser(selector).of_grouping("chosen one after the other", grouping)
        mixture = grouping.mixtures[left[0]]
        trained[left[0]] = ObservedRun(mixture, truth.losses(mixture)["validation"])


def measured(truth: Truth, ensemble: Ensemble) -> dict:
    """One line of the results."""
    line = asdict(ensemble)
    del line["serving"], line["lengths"]
    line |= {"num_mixtures": len(line.pop("mixtures")), "true": truth.of(ensemble)}
    print(line, flush=True)
    return line


def trained_here(own, flags: list[str]) -> dict:
    """Lines of the ensembles of a world or of given tasks, which are trained now."""
    if not flags:
        torch.set_num_threads(1)
        world, folder = build_world(0), own.folder or Path("demo_output/choices")
        tasks = TaskSet.from_datasets(world.tasks())
        trainer = demo_trainer(base_model(world, folder / "base", 0), tasks, folder / "run", 0)
    else:
        trainer, tasks = trainer_from_flags(flags)
    train_baseline(trainer)
    chooser = Chooser(trainer.selector())
    choices, chosen = chooser.random_choices(own.choice_seed), chooser.chosen(own.budget)
    others = chooser.rivals(own.budget, own.choice_seed)
    with trainer.working():
        truth = Truth(trainer, tasks)
        return {
            "baseline": measured(truth, chooser.together()),
            "choices": [measured(truth, one) for one in choices],
            "chosen": [measured(truth, one) for one in (chosen, one_after_the_other(trainer, truth, own.budget))],
            "others": [measured(truth, one) for one in others],
        }


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--budget", type=float, default=2.0, help="of the choice whose regret is measured")
    parser.add_argument("--choice_seed", type=int, default=0, help="of the random choices and ensembles")
    parser.add_argument("--folder", type=Path, help="of the generated world's base model and run")
    parser.add_argument(
        "--trained", type=Path, nargs="+", metavar="FOLDER", help="of `budgets.train`, one for each seed"
    )
    own, flags = parser.parse_known_args()
    if (own.folder is not None or own.trained) and flags:
        parser.error(f"--folder and --trained take no other flags: {' '.join(flags)}")
    if own.trained:
        budgets, runs = zip(*map(of_folder, own.trained))
        if len(set(budgets)) > 1:
            parser.error(f"--trained: expected choices of one budget, found {', '.join(map(str, budgets))}.")
        results = {"budget": budgets[0], "output_scales": True, "runs": list(runs)}
    else:
        results = {"budget": own.budget, "output_scales": False, "runs": [trained_here(own, flags)]}
    write_results(own.output, results, table)


if __name__ == "__main__":
    main()
