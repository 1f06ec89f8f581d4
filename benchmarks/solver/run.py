"""How fast and how exact is the surrogates' solver, how much memory does it need, and how does its cost grow?

    python -m benchmarks.solver.run OUTPUT

The features are generated: their spectrum falls like 1/sqrt(i), and tasks differ in mean and in spread along every
direction.
"""

import time
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from hf_ensemble.estimate.outcomes import predicted_outcomes
from hf_ensemble.estimate.surrogate import SurrogateProblem

from ..common import add_machine_flags, make_parser, peak_memory, random_subsets, write_results
from .table import table
from .world import COMPONENTS, penalties, world

# A looser tolerance for comparison, and the library's own.
TOLERANCES = (1e-6, 1e-8)


def many_subsets(count: int) -> dict:
    """Time, memory and accuracy for random subsets of 20 of 40 tasks with 250 rows, next to scikit-learn fits."""
    at_start = peak_memory()
    train, validation = world(40, 250, validation_rows=100)
    mixtures = random_subsets(count, 40, 20, seed=1).astype(np.float64)
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
    """Largest differences from Newton's method in float64 with explicit Hessians."""
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
    """GradEx's procedure: random labels that sign the rows, the margin as one more feature, and lbfgs."""
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
    """Times for several problem sizes, and how they grow with one dimension of the problem."""
    lines = []
    for setting in settings:
        train, _ = world(setting["tasks"], setting["rows"])
        mixtures = random_subsets(setting["subsets"], setting["tasks"], setting["size"], seed=1).astype(np.float64)
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


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--subsets", type=int, default=1000, help="random subsets; the growth tables scale with them")
    add_machine_flags(parser, threads=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with threadpool_limits(arguments.threads):
        results = {"target": many_subsets(arguments.subsets), "growth": growths(arguments.subsets)}
    write_results(arguments.output, results, table)


if __name__ == "__main__":
    main()
