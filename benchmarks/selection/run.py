"""Which tasks are best to train on for a target: those of predictions, or those of simpler methods?

    python -m benchmarks.selection.run OUTPUT --targets sst2 mr [--runs FIDELITY.json] [--part 0/2] FLAGS

Each choice is fine-tuned and scored on test rows. Every method except "all tasks" and "target alone" takes as many
auxiliary tasks as forward selection does for the target; random choices differ from seed to seed. `--runs` names a
fidelity report of the same tasks and recipe, whose runs the learned predictor gets for free. FLAGS are those of
`hf-ensemble fidelity`. Finished runs are kept in OUTPUT_DIR/chosen, so that a killed study can be resumed; with
`--part 0/2`, a process trains every second one and stops.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from datasets import concatenate_datasets

from hf_ensemble.estimate import ObservedRun
from hf_ensemble.select import Selection, SelectionProblem, mean_cosines
from hf_ensemble.select.baselines import learned_selection, similarity_selection, transport_selection
from hf_ensemble.store import FeatureTable
from hf_ensemble.tasks import EXAMPLE_ID, TASK, pop_meta

from ..common import make_parser, write_results
from ..trainers import TrainedMixtures, trainer_from_flags
from .table import table

Choices = dict[str, dict[str, list[Selection]]]
LAST = ("optimal transport", "learned predictor")


def representations(trainer, like: FeatureTable, split: str) -> FeatureTable:
    """The base model's sentence embeddings of the rows in a table of gradients."""
    rows = trainer.train_dataset
    if split == "validation":
        rows = concatenate_datasets([trainer.eval_dataset[name] for name in trainer.tasks])
    found = {}
    model = trainer.model.get_base_model().eval()
    for start in range(0, len(rows), 64):
        features = [rows[index] for index in range(start, min(start + 64, len(rows)))]
        inputs = trainer.data_collator(features)
        meta = pop_meta(inputs)
        with torch.no_grad(), trainer.model.disable_adapter():
            embedded = model.embed(inputs["input_ids"], inputs["attention_mask"]).numpy()
        found.update(zip(zip(meta[TASK], meta[EXAMPLE_ID]), embedded))
    keys = zip((like.task_names[index] for index in like.task), like.example_id.tolist())
    return replace(like, features=np.stack([found[key] for key in keys]))


def choose(
    trainer, targets: list[str], seeds: list[int], runs: list[ObservedRun], without: list[str]
) -> tuple[Choices, list[dict]]:
    """Choices by target, method and seed, and what selection and mixture take for every task."""
    store = trainer.capture()
    selector = trainer.selector()
    estimator = selector.estimator
    hidden = [
        representations(trainer, store.table(split, estimator.task_names), split) for split in ("train", "validation")
    ]
    choices: Choices = {}
    taken = []
    for target in estimator.task_names:
        forward, mixture = selector.select(target), selector.select(target, "mixture")
        taken.append({"target": target, "forward": forward.auxiliary, "mixture": mixture.weights})
        if target not in targets:
            continue
        problem, size = SelectionProblem(estimator, target), len(forward.auxiliary)
        fixed = {
            "forward selection": forward,
            "mixture": mixture,
            "all tasks": selector.select(target, "all"),
            "target alone": selector.select(target, "alone"),
            "gradient similarity": selector.select(target, "gradient_similarity", size),
            "representation similarity": similarity_selection(
                problem, size, mean_cosines(*hidden), "representation_similarity"
            ),
            "random": None,
            "optimal transport": transport_selection(problem, size, *hidden),
        }
        if runs:
            fixed["learned predictor"] = learned_selection(problem, size, runs)
        choices[target] = {
            way: [selector.select(target, "random", size, seed=seed) for seed in seeds]
            if selection is None
            else [selection] * len(seeds)
            for way, selection in fixed.items()
            if way not in without
        }
    return choices, taken


def trainings(choices: Choices, seeds: list[int]) -> Iterator[tuple[Selection, int]]:
    """Choice and seed of each run, seed by seed, the costlier baselines last."""
    ways = dict.fromkeys(way for own in choices.values() for way in own)
    for later in (False, True):
        for position, seed in enumerate(seeds):
            for way in ways:
                if (way in LAST) == later:
                    for own in choices.values():
                        yield own[way][position], seed


def summary(choices: Choices, scores: dict, seeds: list[int]) -> dict:
    """Mean test accuracy and loss over targets, by method and seed."""
    return {
        way: {
            measure: [
                float(np.mean([scores[target][way][position][measure] for target in choices]))
                for position in range(len(seeds))
            ]
            for measure in ("accuracy", "loss")
        }
        for way in next(iter(choices.values()))
    }


def observed_runs(report: Path | None) -> list[ObservedRun]:
    """Fine-tuning runs of a fidelity report."""
    if report is None:
        return []
    known = json.loads(report.read_text())
    return [
        ObservedRun(dict.fromkeys(subset, 1.0), dict(zip(known["task_names"], losses)))
        for subset, losses in zip(known["subsets"], known["true_loss"])
    ]


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--targets", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, help="a fidelity report, for the learned predictor")
    parser.add_argument("--without", nargs="*", default=[], help="methods to leave out")
    parser.add_argument("--part", default="0/1", help="which share of the trainings to make, such as 1/2")
    own, flags = parser.parse_known_args()
    trainer, tasks = trainer_from_flags(flags)
    choices, taken = choose(trainer, own.targets, own.seeds, observed_runs(own.runs), own.without)
    mixtures = TrainedMixtures(trainer, tasks)
    wanted = [(selection.weights, seed, list(selection.targets)) for selection, seed in trainings(choices, own.seeds)]
    mixtures.make(wanted, own.part)
    if not own.part.endswith("/1"):
        return
    scores = {
        target: {
            way: [
                mixtures.scores(selection.weights, seed, [target])[target]
                for selection, seed in zip(selections, own.seeds)
            ]
            for way, selections in ways.items()
        }
        for target, ways in choices.items()
    }
    results = {
        "seeds": own.seeds,
        "mean": summary(choices, scores, own.seeds),
        "scores": scores,
        "choices": {
            target: {
                way: [{"weights": one.weights, "predicted_loss": one.path[-1]["predicted_loss"]} for one in chosen]
                for way, chosen in ways.items()
            }
            for target, ways in choices.items()
        },
        "taken": taken,
    }
    write_results(own.output, results, table)


if __name__ == "__main__":
    main()
