"""Which method groups tasks best, when one adapter is trained per group?

    python -m benchmarks.grouping.run OUTPUT [--num_groups N] [--part 0/2] FLAGS

Each adapter is scored on the test rows of its group's tasks. Baselines: as many random groups, one adapter for all, and
one per task. FLAGS are those of `hf-ensemble fidelity`. Finished runs are kept in
OUTPUT_DIR/chosen; with `--part 0/2`, a process trains every second one and stops.
"""

import numpy as np

from hf_ensemble.select import GROUPING_METHODS, DataSelector, partition_loss

from ..common import make_parser, write_results
from ..trainers import TrainedMixtures, trainer_from_flags
from .table import table

PARTITION_METHODS = [method for method in GROUPING_METHODS if method != "mixtures"]
Groups = list[tuple[list[str], list[str]]]


def groupings(selector: DataSelector, num_groups: int | str, seeds: list[int]) -> dict[str, list[Groups]]:
    """Groups by method and seed: the tasks that each scores, and those it is trained on."""
    names = list(selector.estimator.task_names)
    found = {}
    for method in PARTITION_METHODS:
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


def trained_way(selector: DataSelector, trainings: TrainedMixtures, by_seed: list[Groups], seeds: list[int]) -> dict:
    """Predicted losses and test scores of one method, seed by seed."""
    scores = []
    for groups, seed in zip(by_seed, seeds):
        by_task = {}
        for tasks_of_group, trained in groups:
            by_task |= trainings.scores(dict.fromkeys(trained, 1.0), seed, tasks_of_group)
        scores.append(by_task)
    return {
        "num_groups": len(by_seed[0]),
        "predicted_loss": [partition_loss(selector.estimator, [own for own, _ in groups]) for groups in by_seed],
        "groups": by_seed,
        "scores": scores,
    }


def means(scores: list[dict], names: list[str]) -> dict[str, list[float]]:
    """Mean accuracy and loss over tasks, per seed."""
    return {
        measure: [float(np.mean([score[name][measure] for name in names])) for score in scores]
        for measure in ("accuracy", "loss")
    }


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--num_groups", type=int, help="found by predicted loss by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--without", nargs="*", default=[], help="tasks to leave out of the means")
    parser.add_argument("--part", default="0/1", help="which share of the trainings to make, such as 1/2")
    own, flags = parser.parse_known_args()
    trainer, tasks = trainer_from_flags(flags)
    selector = trainer.selector()
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
    kept = [name for name in tasks.names if name not in own.without]
    ways = []
    for way, by_seed in found.items():
        trained = trained_way(selector, trainings, by_seed, own.seeds)
        ways.append({"way": way, **means(trained["scores"], kept), **trained})
    write_results(own.output, {"seeds": own.seeds, "left_out_of_means": own.without, "ways": ways}, table)


if __name__ == "__main__":
    main()
