"""Markdown tables of the demo."""

from ..common import markdown_table

# Systems in the order of the columns, and what they are called.
SYSTEMS = {"base": "base model", "baseline": "one adapter for all", "ensemble": "ensemble"}


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def table(results: dict) -> str:
    demos = results["demos"]
    header = ["task", *(f"{name}, seed {demo['seed']}" for demo in demos for name in SYSTEMS.values())]
    rows = [
        [task, *(f"{demo['accuracy'][system][task]:.3f}" for demo in demos for system in SYSTEMS)]
        for task in demos[0]["accuracy"]["ensemble"]
    ]
    means = ["**mean**", *(f"{mean(demo['accuracy'][system]):.3f}" for demo in demos for system in SYSTEMS)]
    kept = [
        (
            demo["seed"],
            len(demo["groups"]),
            f"{demo['mean_loss']['baseline']:.3f} / {demo['mean_loss']['ensemble']:.3f}",
            ", ".join(demo["selected"]),
            "yes" if demo["corrupted"] in demo["selected"] else "no",
            f"{demo['mean_relative_error']:.1%}",
            f"{demo['seconds']:.0f}",
        )
        for demo in demos
    ]
    columns = ["seed", "groups", "mean loss, one adapter / ensemble", f"selected for `{demos[0]['target']}`"]
    columns += ["random answers selected", "mean relative error of predicted losses", "seconds"]
    lines = [
        f"Accuracy on the {demos[0]['split']} rows of each task.",
        "",
        *markdown_table(header, [*rows, means]),
        "",
        *markdown_table(columns, kept),
    ]
    return "\n".join(lines) + "\n"
