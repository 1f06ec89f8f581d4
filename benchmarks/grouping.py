"""Groupings, each trained for real: one adapter per group, scored on the test rows of the group's own tasks.

    python benchmarks/grouping.py TARGET [--num_groups N] [--part 0/2] FLAGS

Beside the methods: as many random groups, one adapter for all, one per task. FLAGS are those of `hf-ensemble fidelity`.
Finished trainings are kept in OUTPUT_DIR/chosen. Writes TARGET.json and .md.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from trained import TrainedMixtures
from trl import ModelConfig

from hf_ensemble.cli.arguments import FidelityArguments, parse, with_config
from hf_ensemble.cli.trainers import build_trainer, load_tasks
from hf_ensemble.select import GROUPING_METHODS, DataSelector, partition_loss

Groups = list[tuple[list[str], list[str]]]


def groupings(selector: DataSelector, num_groups: int | None, seeds: list[int]) -> dict[str, list[Groups]]:
    """For each way and seed the groups: their own tasks, and what they are trained on."""
    names = list(selector.estimator.task_names)
    found = {}
    for method in GROUPING_METHODS:
        grouping = selector.group(num_groups, method)
        groups = [(tasks, grouping.trained_on(name)) for name, tasks in grouping.groups.items()]
        found[method] = [groups] * len(seeds)
    count = len(found["direct"][0])
    found["random"] = []
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(names).tolist()
        found["random"].append([(own, own) for own in (sorted(order[start::count]) for start in range(count))])
    found["one for all"] = [[(names, names)]] * len(seeds)
    found["one per task"] = [[([name], [name]) for name in names]] * len(seeds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--num_groups", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--without", nargs="*", default=[], help="Tasks that the mean accuracy leaves out.")
    parser.add_argument("--part", default="0/1")
    own, flags = parser.parse_known_args()
    (arguments, model_arguments), flags = parse([FidelityArguments, ModelConfig], with_config(flags), True)
    tasks = load_tasks(arguments, model_arguments, "fidelity")
    trainer = build_trainer(arguments, model_arguments, tasks, flags)
    selector = trainer.selector(trainer.capture())
    found = groupings(selector, own.num_groups, own.seeds)
    trainings = TrainedMixtures(trainer, tasks)
    wanted = [
        (dict.fromkeys(trained, 1.0), seed, tasks_of_group)
        for position, seed in enumerate(own.seeds)
        for ways in found.values()
        for tasks_of_group, trained in ways[position]
    ]
    trainings.make(wanted, own.part)
    if not own.part.endswith("/1"):
        return
    rows = []
    for way, by_seed in found.items():
        scores = []
        for groups, seed in zip(by_seed, own.seeds):
            by_task = {}
            for tasks_of_group, trained in groups:
                by_task |= trainings.scores(dict.fromkeys(trained, 1.0), seed, tasks_of_group)
            scores.append(by_task)
        kept = [name for name in tasks.names if name not in own.without]
        rows.append(
            {
                "way": way,
                "num_groups": len(by_seed[0]),
                "predicted_loss": [
                    partition_loss(selector.estimator, [own for own, _ in groups]) for groups in by_seed
                ],
                "accuracy": [float(np.mean([score[name]["accuracy"] for name in kept])) for score in scores],
                "loss": [float(np.mean([score[name]["loss"] for name in kept])) for score in scores],
                "groups": by_seed,
                "scores": scores,
            }
        )
    report = {"seeds": own.seeds, "left_out_of_means": own.without, "ways": rows}
    own.target.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    lines = [
        f"Means over {len(tasks) - len(own.without)} tasks' test rows, over {len(own.seeds)} seeds ± deviation.",
        "",
        "| grouping | groups | predicted validation loss | test accuracy | test loss |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{np.mean(row[key]):.3f} ± {np.std(row[key], ddof=1):.3f}" for key in ("accuracy", "loss")]
        lines.append(
            f"| {row['way']} | {row['num_groups']} | {np.mean(row['predicted_loss']):.4f} | {' | '.join(cells)} |"
        )
    own.target.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
