"""Markdown tables of tasks with opposite answers."""

from ..common import markdown_table

HEADER = ("task", "base model", "itself", "its opposite", "both", "opposite is selected")


def table(results: dict) -> str:
    rows = [
        (
            task["task"],
            f"{task['base_loss']:.3f}",
            *(f"{predicted:.3f} / {true:.3f}" for predicted, true in zip(task["predicted"], task["true"])),
            "yes" if task["takes_opposite"] else "no",
        )
        for task in results["tasks"]
    ]
    num_pairs = len(results["tasks"]) // 2
    together = [(name, f"{len(pairs)} of {num_pairs}") for name, pairs in results["pairs_together"].items()]
    lines = [
        "Validation loss of a task at the base model, and trained on the task, on its opposite or on both: "
        "predicted / true.",
        "",
        *markdown_table(HEADER, rows),
        "",
        *markdown_table(("grouping", "pairs in the same group"), together),
    ]
    return "\n".join(lines) + "\n"
