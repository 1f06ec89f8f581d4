"""Are ensembles as good as predicted, and is the one that is chosen the best that could have been?

    python -m benchmarks.choices.run OUTPUT [--budget 2] [--folder FOLDER]    # on the demo's generated world
    python -m benchmarks.choices.run OUTPUT [--budget 2] --config FILE ...     # flags of `hf-ensemble fidelity`

Ten choices of mixtures with a random number of groups and a random budget are trained, and the mean loss of each
ensemble, every task served as it was chosen, is compared with the predicted and the expected one. Then the choice
within a budget, and the same made anew after each training, are compared with twenty other ensembles of at most this
cost, all trained: partitions, mixtures of another number and random ones. The one adapter for all tasks belongs to
every ensemble and has calibrated the predictions. Losses are of the validation rows, which the search has seen, and of
test rows. Every mixture is trained once, and stays in the run.
"""

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from hf_ensemble import TaskSet
from hf_ensemble.cli.demo.flow import base_model, demo_trainer
from hf_ensemble.cli.demo.world import build_world
from hf_ensemble.estimate import ObservedRun, SubsetEstimator
from hf_ensemble.runs import run_selector
from hf_ensemble.runs.systems import BASELINE
from hf_ensemble.select import DataSelector, Grouping, predicted_losses

from ..common import make_parser, write_results
from ..trainers import train_baseline, trainer_from_flags
from .table import table

NUM_CHOICES, NUM_ENSEMBLES = 10, 20


@dataclass(frozen=True)
class Ensemble:
    """Mixtures beside the adapter for all tasks, and who serves each task.

    Args:
        label (`str`): how it was made.
        mixtures (`list[dict[str, float]]`): what is trained besides.
        serving (`dict[str, int]`): index of each task's mixture; -1 for the adapter for all.
        cost (`float`): with the adapter for all.
        predicted_loss (`float`): mean over the tasks.
        expected_loss (`float`, *optional*): of a searched choice.
    """

    label: str
    mixtures: list[dict[str, float]]
    serving: dict[str, int]
    cost: float
    predicted_loss: float
    expected_loss: float | None = None


def of_grouping(label: str, selector: DataSelector, grouping: Grouping) -> Ensemble:
    """The ensemble of a choice."""
    names = [name for name in grouping.groups if name != grouping.baseline_group]
    losses = predicted_losses(_served(selector), grouping)
    rows, serving, own = list(grouping.groups), {}, []
    for column, task in enumerate(grouping.task_names):
        group = grouping.group_of(task)
        serving[task] = names.index(group) if group in names else -1
        own.append(losses[rows.index(group), column])
    mixtures = [grouping.mixtures[name] for name in names]
    return Ensemble(label, mixtures, serving, grouping.cost, float(np.mean(own)), grouping.expected_loss)


def of_mixtures(label: str, selector: DataSelector, weights: np.ndarray) -> Ensemble:
    """The ensemble of given mixtures `(m, T)`, each task served by the one that is predicted to be its best."""
    estimator = _served(selector)
    names = list(estimator.task_names)
    losses = estimator.predict(np.vstack([weights, np.ones(len(names))])).loss
    best = losses.argmin(axis=0)
    mixtures = [{name: float(value) for name, value in zip(names, row) if value > 0} for row in weights]
    serving = {name: int(own) if own < len(weights) else -1 for name, own in zip(names, best)}
    cost = 1.0 + float(estimator.training_cost(weights).sum())
    return Ensemble(label, mixtures, serving, cost, float(losses.min(axis=0).mean()))


def _served(selector: DataSelector) -> SubsetEstimator:
    """Predicts the losses that choices are made by: weights of an ensemble have a scale."""
    return selector.estimator.scaled() if selector.estimator.can_be_scaled else selector.estimator


def random_choices(selector: DataSelector, seed: int) -> list[Ensemble]:
    """Choices with a random number of groups and a random budget."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(NUM_CHOICES):
        count, budget = int(rng.integers(1, 6)), round(float(rng.uniform(1.2, 4.0)), 1)
        grouping = selector.group(count, "mixtures", compute_budget=budget)
        found.append(of_grouping(f"at most {count} mixtures, budget {budget:g}", selector, grouping))
    return found


def rivals(selector: DataSelector, budget: float, seed: int) -> list[Ensemble]:
    """Twenty other ensembles within a budget."""
    rng, size = np.random.default_rng(seed), len(selector.estimator.task_names)
    found = []
    for count in (1, 2, 3, 4, 5):
        grouping = selector.group(count, "mixtures", compute_budget=budget)
        found.append(of_grouping(f"at most {count} mixtures", selector, grouping))
    for count in (2, 3, 4, 5, min(8, size)):
        if budget >= 2:
            found.append(of_grouping(f"{count} groups", selector, selector.group(count)))
    while len(found) < NUM_ENSEMBLES:
        count = int(rng.integers(1, 5))
        if len(found) % 2:
            weights = (rng.integers(count, size=size) == np.arange(count)[:, None]).astype(float)
            label = f"{count} random groups"
        else:
            weights = rng.uniform(size=(count, size)) * (rng.uniform(size=(count, size)) < 0.5)
            label = f"{count} random mixtures"
        weights = weights[weights.any(axis=1)]
        if not len(weights):
            continue
        weights /= weights.max(axis=1, keepdims=True)
        one = of_mixtures(label, selector, weights)
        if one.cost <= budget + 1e-9:
            found.append(one)
    return found


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
        grouping = selector.group(None, "mixtures", compute_budget=budget, trained=trained)
        left = [name for name in grouping.groups if name not in trained and name != grouping.baseline_group]
        if not left:
            return of_grouping("chosen one after the other", selector, grouping)
        mixture = grouping.mixtures[left[0]]
        trained[left[0]] = ObservedRun(mixture, truth.losses(mixture)["validation"])


def measured(truth: Truth, ensemble: Ensemble) -> dict:
    """One line of the results."""
    line = {
        "label": ensemble.label,
        "num_mixtures": len(ensemble.mixtures),
        "cost": ensemble.cost,
        "predicted_loss": ensemble.predicted_loss,
        "expected_loss": ensemble.expected_loss,
        "true": truth.of(ensemble),
    }
    print({key: line[key] for key in ("label", "cost", "predicted_loss", "expected_loss", "true")}, flush=True)
    return line


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--budget", type=float, default=2.0, help="of the choice whose regret is measured")
    parser.add_argument("--choice_seed", type=int, default=0, help="of the random choices and ensembles")
    parser.add_argument("--folder", type=Path, help="of the generated world's base model and run")
    own, flags = parser.parse_known_args()
    if own.folder is not None and flags:
        parser.error(f"--folder is of the generated world, which takes no other flags: {' '.join(flags)}")
    if not flags:
        torch.set_num_threads(1)
        world, folder = build_world(0), own.folder or Path("demo_output/choices")
        tasks = TaskSet.from_datasets(world.tasks())
        trainer = demo_trainer(base_model(world, folder / "base", 0), tasks, folder / "run", 0)
    else:
        trainer, tasks = trainer_from_flags(flags)
    train_baseline(trainer)
    selector = trainer.selector()
    together = Ensemble(
        "one adapter for all",
        [],
        dict.fromkeys(trainer.tasks, -1),
        1.0,
        float(selector.estimator.predict(np.ones((1, len(trainer.tasks)))).loss.mean()),
    )
    choices = random_choices(selector, own.choice_seed)
    chosen = of_grouping("chosen", selector, selector.group(None, "mixtures", compute_budget=own.budget))
    others = rivals(selector, own.budget, own.choice_seed)
    with trainer.working():
        truth = Truth(trainer, tasks)
        lines = {
            "baseline": measured(truth, together),
            "choices": [measured(truth, one) for one in choices],
            "chosen": measured(truth, chosen),
            "one_after_the_other": measured(truth, one_after_the_other(trainer, truth, own.budget)),
            "others": [measured(truth, one) for one in others],
        }
    write_results(own.output, {"budget": own.budget, "choice_seed": own.choice_seed, **lines}, table)


if __name__ == "__main__":
    main()
