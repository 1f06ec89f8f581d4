"""How fast the surrogates of many subsets are solved, in how much memory, how exactly, and how the cost grows.

    python benchmarks/solver.py benchmarks/solver

writes `benchmarks/solver.json` and `benchmarks/solver.md`. The features are generated: a spectrum that falls like
1/sqrt(i), and tasks that differ in mean and in spread along every direction.
"""

import argparse
import json
import os
import resource
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from hf_ensemble.estimate import FeatureReduction
from hf_ensemble.estimate.mixtures import epoch_length
from hf_ensemble.estimate.outcomes import predicted_outcomes
from hf_ensemble.estimate.surrogate import SurrogateProblem

COMPONENTS = 400
# The tolerance that was asked for, and the library's own.
TOLERANCES = (1e-6, 1e-8)
# About what the evidence chooses on real tasks, see real_tasks.json.
L2_SCALE = 1.0


def world(tasks: int, rows: int, validation_rows: int = 0, seed: int = 0):
    """Components, margins and tasks of training rows and of validation rows."""
    rng = np.random.default_rng(seed)
    spread = np.arange(1, COMPONENTS + 1) ** -0.5
    mean = 0.5 * spread * rng.normal(size=(tasks, COMPONENTS))
    own_spread = spread * np.exp(0.5 * rng.normal(size=(tasks, COMPONENTS)))

    def table(count):
        task = np.repeat(np.arange(tasks), count)
        features = rng.normal(size=(len(task), COMPONENTS)) * own_spread[task] + mean[task]
        return features, 1.5 * rng.normal(size=len(task)), task

    train, validation = table(rows), table(validation_rows)
    reduction = FeatureReduction.fit(train[0], COMPONENTS)
    return [(reduction.apply(features), margin, task) for features, margin, task in (train, validation)]


def random_subsets(count: int, tasks: int, size: int, seed: int = 1) -> np.ndarray:
    order = np.random.default_rng(seed).random((count, tasks)).argsort(axis=1)
    return (order < size).astype(np.float64)


def penalties(mixtures: np.ndarray, rows: int) -> np.ndarray:
    counts = np.full(mixtures.shape[1], rows)
    # It falls with the length of an epoch, a little faster than that grows.
    return L2_SCALE / counts.sum() * (counts.sum() / epoch_length(mixtures, counts)) ** 1.25


def peak_memory() -> int:
    """Bytes that the process held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def target(count: int) -> dict:
    """Random subsets of 20 of 40 tasks of 250 rows: time, memory, agreement, and one scikit-learn fit per subset."""
    at_start = peak_memory()
    train, validation = world(40, 250, validation_rows=100)
    mixtures = random_subsets(count, 40, 20)
    l2 = penalties(mixtures, 250)
    solved = []
    for tolerance in TOLERANCES:
        start = time.perf_counter()
        solution = SurrogateProblem(*train).solve(mixtures, l2, tolerance=tolerance)
        seconds = time.perf_counter() - start
        solved.append(
            {
                "tolerance": tolerance,
                "seconds": seconds,
                "greatest_gradient_norm": solution.gradient_norm.max(),
                "newton_steps": solution.iterations.mean(),
                "peak_memory_above_start_bytes": peak_memory() - at_start,
                "agreement": agreement(train, validation, mixtures, l2, solution.coefficients),
            }
        )
    fits = [scikit_learn(train, mixtures, l2), scikit_learn(train, mixtures, l2, tol=TOLERANCES[0], max_iter=10_000)]
    for fit in fits:
        fit["times_slower"] = [count * fit["seconds_for_one_subset"] / ours["seconds"] for ours in solved]
    return {
        "subsets": count,
        "tasks": 40,
        "tasks_in_a_subset": 20,
        "rows_of_a_task": 250,
        "components": COMPONENTS,
        "l2": l2[0],
        "solved": solved,
        "scikit_learn": fits,
    }


def agreement(train, validation, mixtures, l2, coefficients, sample: int = 20) -> dict:
    """Greatest differences from Newton's method in float64 with Hessians formed and factorised."""
    sample = min(sample, len(mixtures))
    exact = np.stack([exact_optimum(*train, mixture, penalty) for mixture, penalty in zip(mixtures[:sample], l2)])
    losses = [predicted_outcomes(*validation, mixtures.shape[1], w)[0] for w in (coefficients[:sample], exact)]
    return {
        "sample": sample,
        "coefficients": np.abs(coefficients[:sample] - exact).max(),
        "greatest_coefficient": np.abs(exact).max(),
        "predicted_losses": np.abs(losses[0] - losses[1]).max(),
    }


def exact_optimum(features, margin, task, mixture, l2):
    used = mixture[task] > 0
    x, m = features[used], margin[used]
    weight = mixture[task][used] / mixture[task].sum()
    w = np.zeros(x.shape[1])
    for _ in range(50):
        wrong = 1 / (1 + np.exp(m + x @ w))
        gradient = 2 * l2 * w - x.T @ (weight * wrong)
        if np.linalg.norm(gradient) < 1e-13:
            break
        hessian = (x.T * (weight * wrong * (1 - wrong))) @ x + 2 * l2 * np.eye(len(w))
        w -= np.linalg.solve(hessian, gradient)
    return w


def scikit_learn(train, mixtures, l2, sample: int = 20, **options) -> dict:
    """The procedure of GradEx: random labels, rows signed by them, the margin as one more feature, lbfgs."""
    features, margin, task = train
    labels = np.random.default_rng(0).integers(0, 2, size=len(task))
    signed = np.column_stack([features, margin]) * (2 * labels - 1)[:, None]
    sample = min(sample, len(mixtures))
    seconds, steps, norms = [], [], []
    for mixture, penalty in zip(mixtures[:sample], l2):
        start = time.perf_counter()
        used = mixture[task] > 0
        x, y = signed[used], labels[used]
        model = LogisticRegression(C=1 / (2 * penalty * len(y)), fit_intercept=False, solver="lbfgs", **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x, y)
        seconds.append(time.perf_counter() - start)
        steps.append(int(model.n_iter_[0]))
        w = model.coef_[0]
        norms.append(np.linalg.norm(x.T @ (model.predict_proba(x)[:, 1] - y) / len(y) + 2 * penalty * w))
    return {
        "tol": model.tol,
        "sample": sample,
        "seconds_for_one_subset": np.mean(seconds),
        "lbfgs_steps": np.mean(steps),
        "greatest_gradient_norm": max(norms),
    }


def growth(settings: list[dict], by: str) -> dict:
    """Times of several sizes of a problem, and how they grow with one of its numbers."""
    lines = []
    for setting in settings:
        train, _ = world(setting["tasks"], setting["rows"])
        mixtures = random_subsets(setting["subsets"], setting["tasks"], setting["size"])
        problem, l2 = SurrogateProblem(*train), penalties(mixtures, setting["rows"])
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            solution = problem.solve(mixtures, l2)
            seconds.append(time.perf_counter() - start)
        pairs = setting["subsets"] * setting["size"] * setting["rows"]
        lines.append(
            {
                **setting,
                "seconds": min(seconds),
                "nanoseconds_per_subset_and_row": 1e9 * min(seconds) / pairs,
                "newton_steps": solution.iterations.mean(),
            }
        )
    slope = np.polyfit(np.log([line[by] for line in lines]), np.log([line["seconds"] for line in lines]), 1)[0]
    return {"by": by, "slope": slope, "sizes": lines}


def growths(count: int) -> dict:
    share = count / 1000
    few, some, many = (max(4, round(number * share)) for number in (60, 250, 1000))
    return {
        "subsets": growth(
            [{"subsets": some * 2**i, "tasks": 40, "size": 20, "rows": 250} for i in range(4)], "subsets"
        ),
        "tasks, half of them in a subset": growth(
            [{"subsets": few, "tasks": t, "size": t // 2, "rows": 100} for t in (60, 120, 250, 500, 1000)], "tasks"
        ),
        "tasks, 20 of them in a subset": growth(
            [{"subsets": many, "tasks": t, "size": 20, "rows": 100} for t in (40, 100, 250, 500, 1000)], "tasks"
        ),
        "rows of a task": growth(
            [{"subsets": some, "tasks": 40, "size": 20, "rows": 60 * 2**i} for i in range(5)], "rows"
        ),
    }


def tables(results: dict) -> str:
    """The results as Markdown."""
    main, machine = results["target"], results["machine"]
    lines = [
        f"{main['subsets']} random subsets of {main['tasks_in_a_subset']} of {main['tasks']} tasks of "
        f"{main['rows_of_a_task']} rows, {main['components']} components, l2 = {main['l2']:.2g}; {machine['threads']} "
        f"threads on {machine['cores']} cores.",
        "",
        "| | " + " | ".join(f"tolerance {ours['tolerance']:.0e}" for ours in main["solved"]) + " |",
        "|---" * (1 + len(main["solved"])) + "|",
    ]
    close = main["solved"][0]["agreement"]
    for name, cell in {
        "time for all subsets": lambda ours: f"{ours['seconds']:.2f} s",
        "greatest gradient norm": lambda ours: f"{ours['greatest_gradient_norm']:.1e}",
        "Newton steps, mean": lambda ours: f"{ours['newton_steps']:.1f}",
        "peak memory above the start, with the data": lambda ours: (
            f"{ours['peak_memory_above_start_bytes'] / 2**20:.0f} MiB"
        ),
        f"greatest difference of a predicted loss from an exact solver ({close['sample']} subsets)": lambda ours: (
            f"{ours['agreement']['predicted_losses']:.1e}"
        ),
        f"greatest difference of a coefficient (the greatest is {close['greatest_coefficient']:.1f})": lambda ours: (
            f"{ours['agreement']['coefficients']:.1e}"
        ),
    }.items():
        lines.append(f"| {name} | {' | '.join(cell(ours) for ours in main['solved'])} |")
    for fit in main["scikit_learn"]:
        lines.append(
            f"| one scikit-learn fit per subset, tol {fit['tol']:.0e}: {1000 * fit['seconds_for_one_subset']:.1f} ms "
            f"each, gradient norm up to {fit['greatest_gradient_norm']:.1e} ({fit['sample']} subsets) | "
            + " | ".join(f"{slower:.0f} times slower" for slower in fit["times_slower"])
            + " |"
        )
    for name, table in results["growth"].items():
        lines += [
            "",
            f"Time against the number of {name}: slope {table['slope']:.2f} in logarithms.",
            "",
            "| subsets | tasks | tasks in a subset | rows of a task | time | per subset and row used | Newton steps |",
            "|---|---|---|---|---|---|---|",
        ]
        for line in table["sizes"]:
            lines.append(
                f"| {line['subsets']} | {line['tasks']} | {line['size']} | {line['rows']} | {line['seconds']:.3f} s | "
                f"{line['nanoseconds_per_subset_and_row']:.0f} ns | {line['newton_steps']:.1f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="path of the results without .json and .md")
    parser.add_argument("--subsets", type=int, default=1000, help="fewer for a try")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with threadpool_limits(arguments.threads):
        results = {
            "machine": {
                "cores": os.cpu_count(),
                "threads": arguments.threads,
                "torch": torch.__version__,
            },
            "target": target(arguments.subsets),
            "growth": growths(arguments.subsets),
        }
    Path(f"{arguments.output}.json").write_text(json.dumps(results, indent=1, default=float) + "\n")
    Path(f"{arguments.output}.md").write_text(tables(results))


if __name__ == "__main__":
    main()
