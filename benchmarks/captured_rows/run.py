"""How many rows of a task have to be captured for predictions as good as those from all rows?

    python -m benchmarks.captured_rows.run OUTPUT

A world of tasks in a few topics is generated, as gradient features and margins of every row. The truth is the
surrogate's solution from all rows in these features. Predictions are made as always from what a capture keeps of them:
a random projection, of all rows or of a sample of each task's, calibrated by the true losses of one training on all
tasks. How far trainings go, `--penalty`, decides how much of the rows' noise they learn: by default they lower the
losses of their tasks as much as those of the instruction tasks of the fidelity study do.
"""

import time

import numpy as np
import torch

from hf_ensemble import FeatureTable, ObservedRun, SubsetEstimator
from hf_ensemble.capture.row_sample import sampled_positions
from hf_ensemble.estimate import SurrogateProblem
from hf_ensemble.estimate.outcomes import predicted_outcomes
from hf_ensemble.evaluate.fidelity_measures import coverage, mean_or_nan, mean_relative_error, task_spearman

from ..common import add_machine_flags, make_parser, random_subsets, read_results, shape_of, write_results
from .table import draw, table

_SIZES = (1, 3, 6, 12, 25)
_NUM_TOPICS = 6
# Arguments that may differ from those that earlier lines were measured with.
_NOT_IN_LINES = ("seeds", "capture_cost", "threads")


def world(arguments, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features `(n, dim)`, margins and task of every row `(n,)`."""
    dim, tasks = arguments.dim, arguments.tasks
    rows = arguments.rows if split == "train" else arguments.validation_rows
    shared = np.random.default_rng(0)
    topics, of = shared.normal(size=(_NUM_TOPICS, dim)), shared.integers(_NUM_TOPICS, size=tasks)
    means = 0.35 * topics[of] + 0.35 * shared.normal(size=(tasks, dim))
    rng, scale = np.random.default_rng(1 if split == "train" else 2), np.arange(1, dim + 1) ** -0.5
    features = np.empty((tasks * rows, dim), dtype=np.float32)
    for task in range(tasks):
        features[task * rows : (task + 1) * rows] = (rng.normal(size=(rows, dim)) + means[task]) * scale
    norm = np.sqrt(np.square(scale).sum())
    return features / norm, 1.5 * rng.normal(size=tasks * rows), np.repeat(np.arange(tasks), rows)


def true_optima(train, mixtures: np.ndarray, penalty: float) -> np.ndarray:
    """Solutions `(S, dim)` from all rows, whose trainings are as long as their rows."""
    problem = SurrogateProblem(*train)
    return problem.solve(mixtures, penalty / (mixtures @ problem.counts)).coefficients


def observed_run(names: tuple[str, ...], validation, kept: FeatureTable, w: np.ndarray) -> ObservedRun:
    """The training on all tasks, with its losses of all validation rows and of those that are captured."""
    rows = np.sort(kept.example_id.astype(int))
    parts = [validation, tuple(array[rows] for array in validation)]
    losses = [predicted_outcomes(*part, len(names), w[None])[0][0] for part in parts]
    every, captured = (dict(zip(names, own.tolist())) for own in losses)
    return ObservedRun(dict.fromkeys(names, 1.0), every, {} if kept.task_sizes is None else captured)


def captured(rows, names: tuple[str, ...], projection: np.ndarray, count: int | None, seed: int) -> FeatureTable:
    """What is kept of the rows, or of `count` of each task's."""
    features, margin, task = rows
    sizes = np.bincount(task)
    ids = np.arange(len(task)).astype(str)
    kept = np.arange(len(task))
    if count is not None and count < sizes.max():
        own = [np.flatnonzero(task == index) for index in range(len(names))]
        same = np.zeros(sizes.max(), dtype=int)
        kept = np.concatenate(
            [rows[sampled_positions(ids[rows], same[: len(rows)], count, f"{seed} {rows[0]}")] for rows in own]
        )
    sampled = None if len(kept) == len(task) else sizes
    return FeatureTable(features[kept] @ projection, margin[kept], task[kept], names, ids[kept], None, sampled)


def measured(estimator: SubsetEstimator, mixtures: np.ndarray, true: np.ndarray) -> dict:
    """Agreement of predictions with the truth."""
    prediction = estimator.predict(mixtures)
    inside = mixtures > 0
    return {
        "error": mean_relative_error(prediction.loss, true),
        "error_inside": mean_relative_error(prediction.loss[inside], true[inside]),
        "spearman": mean_or_nan(task_spearman(prediction.loss, true)),
        "spearman_inside": mean_or_nan(task_spearman(prediction.loss, true, inside)),
        "coverage": coverage(prediction.loss_low, prediction.loss_high, true),
    }


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--rows", type=int, default=20_000, help="training rows of a task")
    parser.add_argument("--validation_rows", type=int, default=100, help="validation rows of a task")
    parser.add_argument("--dim", type=int, default=64, help="dimensions of the true gradients")
    parser.add_argument("--captured_dim", type=int, default=256, help="features of a captured row")
    parser.add_argument("--counts", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--seeds", type=int, default=2, help="samples of each size")
    parser.add_argument("--penalty", type=float, default=3000.0, help="c of the true solutions")
    parser.add_argument("--capture_cost", type=float, default=0.98, help="of a row, in training steps on a row")
    add_machine_flags(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train, validation = world(arguments, "train"), world(arguments, "validation")
    names = tuple(f"task_{index}" for index in range(arguments.tasks))
    subsets = [random_subsets(10, arguments.tasks, size, seed=size) for size in _SIZES if size < arguments.tasks]
    mixtures = np.concatenate([np.ones((1, arguments.tasks)), *subsets]).astype(float)
    optima = true_optima(train, mixtures, arguments.penalty)
    true = predicted_outcomes(*validation, arguments.tasks, optima)[0]
    base = predicted_outcomes(*validation, arguments.tasks, np.zeros((1, arguments.dim)))[0]
    projection = np.random.default_rng(3).normal(size=(arguments.dim, arguments.captured_dim)).astype(np.float32)
    projection /= np.sqrt(arguments.captured_dim)
    kept = read_results(arguments.output, **shape_of(arguments, "counts", *_NOT_IN_LINES))
    results = {
        **kept,
        **shape_of(arguments, "counts"),
        "mixtures": len(mixtures) - 1,
        "mean_loss": {"base": float(base.mean()), "trained": float(true[1:].mean())},
        "mean_move": float(np.log(base / true[1:])[mixtures[1:] > 0].mean()),
        "lines": kept.get("lines", []),
    }
    known = {(line["train"], line["validation"], line["seed"]) for line in results["lines"]}
    pairs = [(n, own) for n in arguments.counts for own in (None, n) if own is None or own < arguments.validation_rows]
    for both in (None, *pairs):
        for seed in range(1 if both is None else arguments.seeds):
            of_train, of_validation = both or (None, None)
            if (of_train, of_validation, seed) in known:
                continue
            begun = time.perf_counter()
            held_out = captured(validation, names, projection, of_validation, seed)
            estimator = SubsetEstimator(
                captured(train, names, projection, of_train, seed),
                held_out,
                num_components=arguments.dim,
                observed_runs=[observed_run(names, validation, held_out, optima[0])],
            )
            line = {"train": of_train, "validation": of_validation, "seed": seed}
            line |= measured(estimator, mixtures[1:], true[1:])
            results["lines"].append({**line, "seconds": round(time.perf_counter() - begun, 1)})
            write_results(arguments.output, results, table)
    draw(results, f"{arguments.output}.png")


if __name__ == "__main__":
    main()
