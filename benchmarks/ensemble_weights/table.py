"""Markdown table of ensemble weights on test rows."""

from ..common import markdown_table


def table(results: dict) -> str:
    names = list(results["weights"])
    rows = [
        (
            way,
            f"{mean['loss']:.4f}",
            f"{mean['accuracy']:.3f}",
            *(f"{results['scores'][way][task]['loss']:.3f}" for task in names),
        )
        for way, mean in results["mean"].items()
    ]
    lines = [
        f"{len(results['adapters'])} adapters, test rows of {len(names)} tasks: means over tasks, then the loss of "
        "each task. Accuracy is exact match for generated answers.",
        "",
        *markdown_table(("weights", "mean loss", "mean accuracy", *names), rows),
    ]
    return "\n".join(lines) + "\n"
