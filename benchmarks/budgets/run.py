"""What accuracy does each way to train reach for what it costs?

    python -m benchmarks.budgets.run OUTPUT --folders short-150=OUT/short-150-0 short-150=OUT/short-150-1

FOLDERS are those of `benchmarks.budgets.train`, of one recipe and several seeds each; a system's figures are over the
seeds that have finished it, and so is what it is compared with. `--earlier` adds the seeds of results that this command
has written before, as when their folders are gone. Tasks are served by the adapter that was made for them,
by weights chosen on validation rows, and, as a bound that no choice can better, by the adapter that is best on the test
rows.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from hf_ensemble.ensemble.weighting.collector import CollectedAnswers
from hf_ensemble.ensemble.weighting.cross_validation import cross_validated_weights
from hf_ensemble.ensemble.weighting.objectives import fit_objective
from hf_ensemble.evaluate import RowScores, system_intervals

from ..common import make_parser, rows_over_seeds, write_results
from .earlier import pooled
from .picture import draw
from .systems import ONE_FOR_ALL
from .table import table
from .train import EPOCHS, PLAN, TARGETS

# Members below this weight are left out, as by the trainers.
MIN_WEIGHT = 0.05
# Members that weights are fitted to at most: those of a task alone answer for no other.
MAX_MEMBERS = 9
WAYS = ("own", "weights", "oracle")


@dataclass
class Outputs:
    """What the adapters of one seed say.

    Args:
        folder (`Path`): of the trainings.
    """

    folder: Path

    def __post_init__(self):
        self.plan = json.loads((self.folder / PLAN).read_text())
        epochs = self.folder / EPOCHS
        self.validation_curve = json.loads(epochs.read_text()) if epochs.exists() else None
        self._parts: dict[str, dict[str, np.ndarray]] = {}

    @property
    def tasks(self) -> list[str]:
        return self.plan["tasks"]

    def has(self, system: dict) -> bool:
        return all((self.folder / "outputs" / f"{name}.npz").exists() for name in system["parts"])

    def part(self, name: str) -> dict[str, np.ndarray]:
        """Log-probabilities of a part by split and task."""
        if name not in self._parts:
            with np.load(self.folder / "outputs" / f"{name}.npz") as found:
                self._parts[name] = dict(found)
        return self._parts[name]

    @cached_property
    def baseline(self) -> str:
        return next(one["parts"][0] for one in self.plan["systems"] if one["label"] == ONE_FOR_ALL)

    def answers(self, members: list[str], split: str, task: str) -> CollectedAnswers:
        """What members say of a task's rows."""
        values = np.stack([self.part(name)[f"{split}/{task}"] for name in members]).astype(np.float32)
        targets = torch.from_numpy(self.part(TARGETS)[f"{split}/{task}"].astype(np.int64))
        return CollectedAnswers(torch.from_numpy(values), targets, torch.arange(len(targets)))

    def members(self, system: dict, task: str) -> list[str]:
        """The parts of a system that can serve a task, its own first; no more than weights are fitted to."""
        own = system["own"][task]
        able = [name for name in system["parts"] if f"test/{task}" in self.part(name)]
        return [own, *[name for name in able if name != own]][:MAX_MEMBERS]


@dataclass
class Served:
    """A system of one seed, served in one way.

    Args:
        validation_loss (`float`): mean over the tasks.
        rows (`dict[str, RowScores]`): of the test rows by task.
    """

    validation_loss: float
    rows: dict[str, RowScores]


def scored(answers: CollectedAnswers, weights: np.ndarray) -> RowScores:
    """Scores of the rows under combined log-probabilities."""
    combined = torch.einsum("m,mnv->nv", torch.from_numpy(weights).double(), answers.values.double())
    losses = torch.nn.functional.cross_entropy(combined, answers.targets, reduction="none")
    return RowScores(losses.numpy(), (combined.argmax(-1) == answers.targets).double().numpy())


def served(outputs: Outputs, system: dict, seed: int) -> dict[str, Served]:
    """Scores of a system in each way."""
    found = {way: Served(0.0, {}) for way in WAYS}
    for task in outputs.tasks:
        members = outputs.members(system, task)
        validation, test = (outputs.answers(members, split, task) for split in ("validation", "test"))
        size = len(members)
        single = [scored(test, row) for row in np.eye(size)]
        own = np.full(size, 1 / size) if system["together"] else np.eye(size)[0]
        optimum = fit_objective(validation.objective("logits"), size, "simplex", "logits", MIN_WEIGHT)
        shares = dict(zip(members, own.tolist()))
        chosen = cross_validated_weights(validation, members, "logits", optimum, shares, MIN_WEIGHT, seed=seed)
        weights = {"own": own, "weights": chosen.scale * chosen.weights}
        for way, values in weights.items():
            found[way].rows[task] = scored(test, values)
            found[way].validation_loss += scored(validation, values).loss.mean() / len(outputs.tasks)
        best = max(range(size), key=lambda k: (single[k].correct.mean(), -single[k].loss.mean()))
        found["oracle"].rows[task] = single[best]
        found["oracle"].validation_loss += scored(validation, np.eye(size)[best]).loss.mean() / len(outputs.tasks)
    return found


def of_recipe(folders: list[Path]) -> dict:
    """Every system, over the seeds that have finished it."""
    seeds = [Outputs(folder) for folder in folders]
    plans = [{one["label"]: one for one in own.plan["systems"] if own.has(one)} for own in seeds]
    planned = list(dict.fromkeys(one["label"] for own in seeds for one in own.plan["systems"]))
    labels = [label for label in planned if any(label in plan for plan in plans)]
    by_seed = [
        {label: served(own, plan[label], number) for label in labels if label in plan}
        for number, (own, plan) in enumerate(zip(seeds, plans))
    ]
    systems = []
    for label in labels:
        numbers = [number for number, found in enumerate(by_seed) if label in found]
        own = [plans[number][label] for number in numbers]
        predicted = [np.mean(list(one["predicted"].values())) for one in own if one["predicted"]]
        entry = {
            "system": label,
            "seeds": len(numbers),
            "cost": float(np.mean([one["cost"] for one in own])),
            "adapters": float(np.mean([len(one["parts"]) for one in own])),
            "predicted_validation_loss": float(np.mean(predicted)) if predicted else None,
        }
        for way in WAYS:
            entry[way] = _scores([by_seed[number] for number in numbers], label, way)
        systems.append(entry)
    return {
        "seeds": len(seeds),
        "tasks": seeds[0].tasks,
        "train_rows": seeds[0].plan["train_rows"],
        "steps": [own.plan["steps"] for own in seeds],
        "validation_curves": [own.validation_curve for own in seeds if own.validation_curve],
        "unfinished": sorted(set(planned) - set(labels)),
        "systems": systems,
    }


def _scores(seeds: list[dict[str, dict[str, Served]]], label: str, way: str) -> dict:
    """Of a system that is served in one way, and its differences from one adapter for all of the same seeds."""
    found = [one[label][way] for one in seeds]
    scores, reference = (rows_over_seeds(rows) for rows in zip(*[(one[label][way].rows, _plain(one)) for one in seeds]))
    differences = system_intervals({"system": scores, "reference": reference}, "reference")["system"].mean_difference
    accuracies = [[one.rows[task].correct.mean() for task in scores] for one in found]
    return {
        "validation_loss": float(np.mean([one.validation_loss for one in found])),
        "test_loss": float(np.mean([score.loss.mean() for score in scores.values()])),
        "test_accuracy": float(np.mean(accuracies)),
        "accuracy_of_seeds": np.mean(accuracies, axis=1).tolist(),
        "accuracy_of_tasks": {task: float(score.correct.mean()) for task, score in scores.items()},
        "differences": {name: [own.value, *own.interval] for name, own in differences.items()},
    }


def _plain(seed: dict[str, dict[str, Served]]) -> dict[str, RowScores]:
    return seed[ONE_FOR_ALL]["own"].rows


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--folders", nargs="+", required=True, help="NAME=FOLDER, several of each name")
    parser.add_argument("--earlier", type=Path, metavar="FILE", help="JSON of other seeds, scored before")
    arguments = parser.parse_args()
    recipes: dict[str, list[Path]] = {}
    for given in arguments.folders:
        name, _, folder = given.partition("=")
        recipes.setdefault(name, []).append(Path(folder))
    plan = Outputs(next(iter(recipes.values()))[0]).plan
    # Of the trainings; scores are put together anywhere.
    results = {name: plan[name] for name in ("machine", "versions")}
    results["recipes"] = {name: of_recipe(sorted(folders)) for name, folders in recipes.items()}
    if arguments.earlier:
        earlier = json.loads(arguments.earlier.read_text())
        results["commands"] = earlier["commands"]
        for name, own in earlier["recipes"].items():
            later = results["recipes"].get(name)
            results["recipes"][name] = pooled(own, later) if later else own
    write_results(arguments.output, results, table)
    draw(results, Path(f"{arguments.output}.png"))


if __name__ == "__main__":
    main()
