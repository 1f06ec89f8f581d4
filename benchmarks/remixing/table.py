"""Markdown tables of ways to mix the tasks of one training."""

import numpy as np

from ..common import markdown_table

HEADER = ("shares of the tasks", "cost", "validation loss", "test loss", "test accuracy")


def table(results: dict) -> str:
    lines = [
        f"One adapter on {len(results['tasks'])} tasks of up to {results['rows']} training rows, {results['epochs']} "
        f"epochs; means over {len(results['seeds'])} seeds ± standard deviation, on test rows. The cost is the rows "
        "that go forward and backward, in multiples of the proportional training's: those that are trained on, those "
        "that gradients are captured of, and those of DoReMi's reference and proxy.",
        "",
    ]
    for goal, ways in results["goals"].items():
        others = list(dict.fromkeys(name for own in ways.values() for name in own["differences"]))
        header = (*HEADER, *(f"{figure} against {other}" for other in others for figure in ("loss", "accuracy")))
        rows = [_row(way, own, others) for way, own in ways.items()]
        lines += [f"## For {goal}", "", *markdown_table(header, rows), ""]
        drawn = {way: own["last_shares"] for way, own in ways.items() if not way.endswith("longer")}
        shares = [(task, *(f"{own[k]:.2f}" for own in drawn.values())) for k, task in enumerate(results["tasks"])]
        lines += ["Shares of the rows in the last epoch:", "", *markdown_table(("task", *drawn), shares), ""]
    lines += ["Differences are of test rows, paired, with 95 % intervals over rows; those of accuracy in points.", ""]
    return "\n".join(lines)


def _row(way: str, own: dict, others: list[str]) -> tuple:
    cells = [_mean(own[name]) for name in ("validation_loss", "test_loss", "test_accuracy")]
    for other in others:
        found = own["differences"].get(other)
        cells.append("" if found is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(*found["loss"]))
        points = [] if found is None else [100 * value for value in found["accuracy"]]
        cells.append("" if found is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*points))
    return way, f"{own['cost']:.2f}", *cells


def _mean(values: list[float]) -> str:
    return f"{np.mean(values):.4f}" + (f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else "")
