"""What do mixtures, and trainings that go on, gain in truth for what they cost?

    python -m benchmarks.mixtures.run OUTPUT [--budgets 1.5 2] [--continued 1.25 1.5 2] [--part 0/2] FLAGS

Every system is trained and scored on test rows: one adapter for all tasks, also at the cost of the others (longer
training); partitions; mixtures within a budget, from the start and from the adapter for all tasks on; and this adapter
fine-tuned on each task. Each task is served by the adapter with the least loss on its validation rows, or by weights
that are fitted to them. FLAGS are those of `hf-ensemble fidelity`. Trainings are kept in OUTPUT_DIR; with `--part 0/2`,
a process makes every second one and stops.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from hf_ensemble.ensemble import PeftEnsembleModel
from hf_ensemble.ensemble.weighting.fitting import fit_ensemble
from hf_ensemble.runs import run_selector
from hf_ensemble.select import DataSelector, Grouping
from hf_ensemble.train.comparison.makers import loaded_adapters
from hf_ensemble.train.flows.capturing import gradients_at_baseline

from ..common import make_parser, read_results, write_results
from ..trainers import train_baseline, trainer_from_flags
from .table import table

# Members below this weight are left out, as by the trainers.
MIN_WEIGHT = 0.05
# Maximum number of adapters that weights are fitted to.
MAX_FITTED = 9


@dataclass(frozen=True)
class Part:
    """One training of a system.

    Args:
        mixture (`dict[str, float]`): weight of each task's rows.
        length (`float`): in multiples of the recipe's.
        goes_on (`bool`): whether it begins at the adapter for all tasks.
        cost (`float`): in multiples of one adapter for all.
    """

    mixture: dict[str, float]
    length: float
    goes_on: bool
    cost: float

    @property
    def name(self) -> str:
        """Of the training in the run; equal trainings have one name."""
        weights = "_".join(f"{task}-{weight:.4f}" for task, weight in sorted(self.mixture.items()))
        digest = blake2b(weights.encode(), digest_size=6).hexdigest()
        return f"mix-{digest}-{self.length:g}{'-on' if self.goes_on else ''}"


def systems(
    selector: DataSelector, going_on: Callable[[float], DataSelector], budgets: list[float], continued: list[float]
) -> dict[str, tuple[list[Part], float]]:
    """The trainings of each system, and its predicted mean loss; the adapter for all tasks is the first part of those
    that need it. `going_on` predicts trainings of a length that begin there."""
    estimator = selector.estimator
    names = list(estimator.task_names)
    everything = dict.fromkeys(names, 1.0)
    together = Part(everything, 1.0, False, 1.0)
    found: dict[str, tuple[list[Part], float]] = {}

    def one_for_all(length: float) -> None:
        l2_scale = estimator.regularization.l2_scale
        longer = estimator.predict(np.ones((1, len(names))), l2_scale / length).loss[0]
        loss = longer if estimator.calibration is None else estimator.calibration(longer)
        found[f"one adapter for all, {length:g} x as long"] = ([Part(everything, length, False, length)], loss.mean())

    def parts_of(grouping: Grouping, length: float, goes_on: bool) -> list[Part]:
        own = [mixture for name, mixture in grouping.mixtures.items() if name != grouping.baseline_group]
        weights = np.array([[mixture.get(name, 0.0) for name in names] for mixture in own]).reshape(-1, len(names))
        return [
            Part(mixture, length, goes_on, float(cost) * length)
            for mixture, cost in zip(own, estimator.training_cost(weights))
        ]

    for length in sorted({1.0, *budgets, *continued}):
        one_for_all(length)
    alone = [
        Part({name: 1.0}, 1.0, False, float(estimator.counts[i] / estimator.counts.sum()))
        for i, name in enumerate(names)
    ]
    loss = estimator.predict(np.eye(len(names))).loss.diagonal().mean()
    found["one per task"] = (alone, float(loss))
    groups = selector.group(has_baseline=False)
    found["partition"] = (parts_of(groups, 1.0, False), min(groups.predicted_loss.values()))
    for budget in budgets:
        for has_baseline in (True, False):
            grouping = selector.group(None, "mixtures", compute_budget=budget, has_baseline=has_baseline)
            parts = [together] * has_baseline + parts_of(grouping, 1.0, False)
            label = "mixtures and one for all" if has_baseline else "mixtures"
            found[f"{label}, budget {budget:g}"] = (parts, grouping.cost_curve[-1]["predicted_loss"])
    for budget in continued:
        length = min(1.0, 2 * (budget - 1.0))
        options = {"compute_budget": budget, "group_initialization": "baseline"}
        grouping = going_on(length).group(None, "mixtures", **options)
        parts = [together, *parts_of(grouping, length, True)]
        found[f"one for all, then mixtures, budget {budget:g}"] = (parts, grouping.cost_curve[-1]["predicted_loss"])
        length = budget - 1.0
        loss = going_on(length).estimator.predict(np.eye(len(names))).loss.diagonal().mean()
        parts = [
            Part({name: 1.0}, length, True, length * estimator.counts[i] / estimator.counts.sum())
            for i, name in enumerate(names)
        ]
        found[f"one for all, then each task, budget {budget:g}"] = ([together, *parts], float(loss))
    return found


class Trainings:
    """Trains parts and scores systems, in a trainer's run."""

    def __init__(self, trainer, tasks):
        trainer.open_run()
        self.flow, self.names = trainer.flow, list(tasks.names)
        context = self.flow.context
        self.validation = context.eval_tables
        self.test = {
            name: context.model_columns(rows) for name, rows in trainer.prepare_rows(tasks.split("test")).items()
        }
        self._folder = Path(trainer.args.output_dir) / "mixtures"

    def folder(self, part: Part) -> Path:
        """Where a part's adapter lies; it is trained where it does not lie there yet."""
        training, run = self.flow.training, self.flow.context.run
        if part.cost == part.length == 1.0 and set(part.mixture) == set(self.names):
            return run.baseline
        start = run.baseline if part.goes_on else None
        folder = self._folder / part.name
        training.run(part.name, part.mixture, folder, start=start, length=part.length)
        return folder

    def score(self, parts: list[Part], max_fitted: int = MAX_FITTED) -> dict:
        """Test scores of a system by task, with the best adapter for each task and with fitted weights."""
        model, names = self.flow.context.model, [f"member_{index}" for index in range(len(parts))]
        folders = [self.folder(part) for part in parts]
        if len(parts) > max_fitted:
            return self._score_assigned(parts, folders)
        with loaded_adapters(self.flow, dict(zip(names, folders))):
            ensemble = PeftEnsembleModel(model, names, label_space=self.flow.context.label_space)
            fit = fit_ensemble(
                ensemble,
                self.validation,
                data_collator=self.flow.context.data_collator,
                batch_size=32,
                min_weight=MIN_WEIGHT,
            )
            scores = {}
            for way in ("assigned", "fitted"):
                losses = []
                for task, own in fit.tasks.items():
                    best = names[int(own.one_hot_losses.argmin())]
                    ensemble.weights[task] = {best: 1.0} if way == "assigned" else fit.weights_of(own)
                    losses.append(own.one_hot_losses.min() if way == "assigned" else own.loss)
                scored = self.flow.evaluation.score_ensemble(ensemble, self.test)
                scores[way] = {task: {"loss": one.loss, "accuracy": one.accuracy} for task, one in scored.items()}
                scores[f"{way}_validation_loss"] = float(np.mean(losses))
        return scores

    def _score_assigned(self, parts: list[Part], folders: list[Path]) -> dict:
        """The same for many adapters, each on the tasks that it was trained on, without fitted weights."""
        found: dict[str, list[tuple[float, Path]]] = {task: [] for task in self.names}
        for part, folder in zip(parts, folders):
            rows = {task: self.validation[task] for task in part.mixture}
            for task, one in self.flow.evaluation.score_adapter(folder, rows, "Validation rows").items():
                found[task].append((one.loss, folder))
        scores: dict[str, dict[str, float]] = {}
        for folder in folders:
            rows = {task: self.test[task] for task in self.names if min(found[task])[1] == folder}
            if rows:
                scored = self.flow.evaluation.score_adapter(folder, rows, "Test rows")
                scores |= {task: {"loss": one.loss, "accuracy": one.accuracy} for task, one in scored.items()}
        loss = float(np.mean([min(own)[0] for own in found.values()]))
        return {"assigned": scores, "assigned_validation_loss": loss}


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--budgets", type=float, nargs="*", default=[1.5, 2.0])
    parser.add_argument("--continued", type=float, nargs="*", default=[1.25, 1.5, 2.0])
    parser.add_argument("--without_fitted", action="store_true", help="leave out fitted weights, which take longest")
    parser.add_argument("--score_part", default="0/1", help="which share of the systems to score, such as 1/2")
    parser.add_argument("--part", default="0/1", help="which share of the trainings to make, such as 1/2")
    own, flags = parser.parse_known_args()
    trainer, tasks = trainer_from_flags(flags)
    train_baseline(trainer)

    def going_on(length: float) -> DataSelector:
        flow = trainer.flow
        with trainer.working():
            gradients_at_baseline(flow.context, flow.training)
        count = trainer.args.num_components
        return run_selector(trainer.run_directory, list(trainer.tasks), count, [], continued_length=length)

    found = systems(trainer.selector(), going_on, own.budgets, own.continued)
    trainings = Trainings(trainer, tasks)
    first, step = (int(number) for number in own.part.split("/"))
    every = {part.name: part for parts, _ in found.values() for part in parts}
    for part in list(every.values())[first::step]:
        trainings.folder(part)
    if step > 1:
        return
    results = []
    first, step = (int(number) for number in own.score_part.split("/"))
    for label, (parts, predicted) in list(found.items())[first::step]:
        scores = trainings.score(parts, 0 if own.without_fitted else MAX_FITTED)
        cost = sum({part.name: part.cost for part in parts}.values())
        results.append(
            {
                "system": label,
                "cost": cost,
                "predicted_loss": float(predicted),
                "parts": [asdict(part) for part in parts],
                **scores,
            }
        )
        print(label, round(cost, 2), np.mean([one["accuracy"] for one in scores["assigned"].values()]), flush=True)
    # Other systems may have been scored by another process.
    kept = read_results(own.output)
    by_label = {one["system"]: one for one in [*kept.get("systems", []), *results]}
    in_order = [by_label[label] for label in found if label in by_label]
    write_results(own.output, {**kept, "systems": in_order}, table)


if __name__ == "__main__":
    main()
