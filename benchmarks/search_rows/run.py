"""How many rows do searches have to look at, for choices as good as those by all rows?

    python -m benchmarks.search_rows.run OUTPUT

The tasks are those of `task_scale`. Selections for several targets and a grouping by direct search look at samples of
several sizes and at all rows; what they choose is predicted from all rows.
"""

import time

import numpy as np
import torch

from hf_ensemble import DataSelector, SubsetEstimator

from ..common import add_machine_flags, make_parser, shape_of, write_results
from ..task_scale.run import world
from .table import table


def selected(selector: DataSelector, targets: list[str], rows: int | None) -> dict:
    """Mean over the targets of the loss of what is selected for each, and the CPU seconds that all take."""
    start = time.process_time()
    found = [selector.select(target, search_rows=rows) for target in targets]
    return {
        "search_rows": rows,
        "cpu_seconds": round(time.process_time() - start, 1),
        "predicted_loss": float(np.mean([one.path[-1]["predicted_loss"] for one in found])),
        "loss_of_all_tasks": float(np.mean([one.baselines["all"] for one in found])),
        "tasks": [one.tasks for one in found],
    }


def grouped(selector: DataSelector, rows: int | None) -> dict:
    """The mean loss of a partition, and the CPU seconds that it takes."""
    start = time.process_time()
    found = selector.group(search_rows=rows)
    return {
        "search_rows": rows,
        "cpu_seconds": round(time.process_time() - start, 1),
        "predicted_loss": found.predicted_loss[str(len(found.groups))],
        "loss_of_one_group": found.baselines["one group"],
        "num_groups": len(found.groups),
    }


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--tasks", type=int, default=60)
    parser.add_argument("--rows", type=int, default=400, help="training rows of a task, and validation rows")
    parser.add_argument("--dim", type=int, default=200, help="captured dimensions")
    parser.add_argument("--targets", type=int, default=3, help="number of targets of selections")
    parser.add_argument("--rows_per_task", type=int, nargs="+", default=[10, 20, 50, 100], help="that searches look at")
    add_machine_flags(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train, validation, run = world(arguments.tasks, arguments.rows, arguments.dim)
    selector = DataSelector(SubsetEstimator(train, validation, observed_runs=[run]))
    targets = [f"task_{place}" for place in range(arguments.targets)]
    sizes = [arguments.tasks * rows for rows in arguments.rows_per_task] + [None]
    selections = [selected(selector, targets, rows) for rows in sizes]
    every = selections[-1]["tasks"]
    for one in selections:
        pairs = zip(one.pop("tasks") if one is not selections[-1] else every, every)
        one["agreement"] = float(np.mean([len({*own} & {*other}) / len({*own} | {*other}) for own, other in pairs]))
    selections[-1].pop("tasks")
    results = {**shape_of(arguments), "selections": selections}
    write_results(arguments.output, results, table)
    results["groupings"] = [grouped(selector, rows) for rows in sizes]
    write_results(arguments.output, results, table)


if __name__ == "__main__":
    main()
