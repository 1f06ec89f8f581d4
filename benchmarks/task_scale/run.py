"""How do time and memory of a choice grow with the number of tasks?

    python -m benchmarks.task_scale.run OUTPUT
    python -m benchmarks.task_scale.run OUTPUT --tasks 1000 --choices group    # adds to the OUTPUT that is there
    python -m benchmarks.task_scale.run OUTPUT --tasks 100 --choices mixtures --rows 200

Tasks of 20 training and 20 validation rows each are generated: a tenth as many topics as tasks, and a mean of its own
for every task. A fine-tuning on all of them is taken to lower every loss by a fifth; trainings that go on (`lengths`)
are calibrated by a replay. Each choice is made in a process of its own.
"""

import multiprocessing
import time

import numpy as np
import torch

from hf_ensemble import DataSelector, FeatureTable, ObservedRun, SubsetEstimator, TrainingRecipe
from hf_ensemble.select.settings import LENGTHS

from ..common import add_machine_flags, make_parser, peak_memory, read_results, write_results
from .table import table

CHOICES = ("select", "mixture", "group", "mixtures", "lengths")


def world(tasks: int, rows: int, dim: int) -> tuple[FeatureTable, FeatureTable, ObservedRun]:
    """Training and validation features, and the losses of a fine-tuning on all tasks."""
    rng = np.random.default_rng(tasks)
    topics, of = rng.normal(size=(max(2, tasks // 10), dim)), rng.integers(max(2, tasks // 10), size=tasks)
    means = 0.35 * topics[of] + 0.35 * rng.normal(size=(tasks, dim))
    names = tuple(f"task_{task}" for task in range(tasks))

    def features() -> FeatureTable:
        task = np.repeat(np.arange(tasks), rows)
        values, spectrum = np.empty((len(task), dim), dtype=np.float32), np.arange(1, dim + 1) ** -0.5
        for own in np.array_split(np.arange(len(task)), tasks):
            values[own] = (rng.normal(size=(len(own), dim)) + means[task[own]]) * spectrum
        ids = np.arange(len(task)).astype(str)
        # Of two answers: no other answer has an entropy.
        entropy = np.zeros(len(task), dtype=np.float32)
        return FeatureTable(values, 1.5 * rng.normal(size=len(task)), task, names, ids, other_entropy=entropy)

    train, validation = features(), features()
    losses = np.bincount(validation.task, np.logaddexp(0, -validation.margin)) / rows
    return train, validation, ObservedRun(dict.fromkeys(names, 1.0), dict(zip(names, (0.8 * losses).tolist())))


def recipe(rows: int, dim: int) -> TrainingRecipe:
    """Of a training of three epochs, whose steps together move every parameter by up to 0.03."""
    steps = 3 * rows // 16
    return TrainingRecipe([0.03 / steps] * steps, 16, float(dim))


def measure(tasks: int, choice: str, rows: int, dim: int, threads: int, budget: float) -> dict:
    """Seconds and peak memory of one choice in this process."""
    torch.set_num_threads(threads)
    train, validation, run = world(tasks, rows, dim)
    start, used = time.perf_counter(), time.process_time()
    options = {"observed_runs": [run]}
    if choice == "lengths":
        options = {"recipe": recipe(len(train), dim), "other_lengths": LENGTHS[1:]}
    selector = DataSelector(SubsetEstimator(train, validation, **options))
    made, used_made = time.perf_counter() - start, time.process_time() - used
    start, used = time.perf_counter(), time.process_time()
    if choice == "select":
        found = selector.select("task_0")
        size, loss = len(found.tasks), found.path[-1]["predicted_loss"]
    elif choice == "mixture":
        found = selector.mixture("task_0")
        size, loss = len(found.weights), found.predicted_loss
    elif choice in ("mixtures", "lengths"):
        start_at = "fresh" if choice == "mixtures" else "baseline"
        found = selector.group(None, "mixtures", compute_budget=budget, group_initialization=start_at)
        size, loss = len(found.groups), found.expected_loss
    else:
        found = selector.group()
        size, loss = len(found.groups), min(found.predicted_loss.values())
    return {
        "tasks": tasks,
        "choice": choice,
        "rows": rows,
        "threads": threads,
        "seconds_to_reduce_and_calibrate": round(made, 1),
        "cpu_seconds_to_reduce_and_calibrate": round(used_made, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - used, 1),
        "peak_resident_bytes": peak_memory(),
        "chosen": size,
        "predicted_loss": loss,
    }


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--rows", type=int, default=20, help="training rows of a task, and validation rows")
    parser.add_argument("--budget", type=float, default=2.0, help="of mixtures, in multiples of one adapter for all")
    parser.add_argument("--dim", type=int, default=400, help="captured dimensions")
    add_machine_flags(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = read_results(arguments.output, budget=arguments.budget, dim=arguments.dim)
    known = {(line["tasks"], line["choice"], line["rows"]): line for line in results.get("choices", [])}
    for tasks in arguments.tasks:
        for choice in arguments.choices:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                settings = (tasks, choice, arguments.rows, arguments.dim, arguments.threads, arguments.budget)
                known[tasks, choice, arguments.rows] = pool.apply(measure, settings)
            lines = [known[key] for key in sorted(known, key=lambda key: (CHOICES.index(key[1]), key[0], key[2]))]
            results = {**results, "budget": arguments.budget, "dim": arguments.dim, "choices": lines}
            write_results(arguments.output, results, table)


if __name__ == "__main__":
    main()
