"""Markdown tables of what boosting steps gain and cost."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..common import markdown_table

HEADER = (
    "seed",
    "method",
    "rows of a task",
    "steps kept / made",
    "worst group's training loss",
    "its validation loss",
    "its test loss",
    "its test accuracy",
    "as weights",
    "mean test loss, all tasks",
    "mean test accuracy, all tasks",
    "operations",
)


def table(results: dict) -> str:
    lines = [
        "The worst group is the one with the highest training loss before the first step. Its training and validation "
        "loss are those before and after the steps that were kept for it. The accuracy as weights is that of one "
        "forward with the adapters' deltas added up in the weights. Operations are those of all steps, in percent of "
        "those of all trainings. Trainings that go on are from the adapter that the steps without training begin at.",
    ]
    for suite, own in results["suites"].items():
        cells = [row for world in own["worlds"] for row in _rows(world)]
        lines += ["", f"### {suite}, groups: {_groups(own)}", "", *markdown_table(HEADER, cells)]
    return "\n".join(lines) + "\n"


def _groups(own: Mapping) -> str:
    return " / ".join(str(len(world["groups"])) for world in own["worlds"])


def _rows(world: Mapping) -> list[Sequence[object]]:
    worst = world["methods"][0]["steps"][0]["tasks"]
    everything = list(world["before"])

    def scores(own: Mapping, tasks: Sequence[str], measure: str) -> str:
        return f"{np.mean([own[task][measure] for task in tasks]):.4f}"

    def cells(own: Mapping, as_weights: str) -> list[str]:
        means = [scores(own, worst, measure) for measure in ("loss", "accuracy")]
        return [*means, as_weights, *(scores(own, everything, measure) for measure in ("loss", "accuracy"))]

    rows: list[Sequence[object]] = [
        (world["seed"], "without steps", "-", "-", "-", "-", *cells(world["before"], "-"), "-"),
    ]
    for own in world["methods"]:
        made, kept = own["steps"], [step for step in own["steps"] if step["kept"]]
        mine = [step for step in kept if step["tasks"] == worst]
        losses = [
            f"{mine[0][name]:.4f} to {mine[-1][f'{name}_after']:.4f}" if mine else f"{made[0][name]:.4f}"
            for name in ("training_loss", "validation_loss")
        ]
        share = sum(step["flops"] for step in made) / world["training_flops"]
        weights = scores(own["after_as_weights"], worst, "accuracy") if mine else "-"
        rows.append(
            (
                world["seed"],
                own["method"],
                own.get("step_rows") or "all",
                f"{len(kept)} / {len(made)}",
                *losses,
                *cells(own["after"], weights),
                f"{share:.1%}",
            )
        )
    for own in next((own["continued"] for own in world["methods"] if own.get("continued")), ()):
        validation = f"{own['validation_loss']:.4f} to {own['validation_loss_after']:.4f}"
        label, share = f"trained on, {own['length']:g} of a training", own["flops"] / world["training_flops"]
        rows.append((world["seed"], label, "all", "-", "-", validation, *cells(own["after"], "-"), f"{share:.1%}"))
    return rows
