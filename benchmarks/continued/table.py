"""Markdown table of predictions of trainings that go on."""

from ..common import formatted, markdown_table

COLUMNS = {
    "error": ("mean relative error", ".1%"),
    "error_inside": ("of tasks trained on", ".1%"),
    "error_outside": ("of the others", ".1%"),
    "correlation_of_changes": ("correlation of the loss changes", ".3f"),
    "correlation_of_changes_inside": ("of tasks trained on", ".3f"),
    "spearman": ("per-task Spearman", ".3f"),
    "coverage": ("within the intervals", ".2f"),
    "level": ("level", ".2f"),
}


def table(results: dict) -> str:
    rows = [
        (label, *(formatted(own.get(key), form) for key, (_, form) in COLUMNS.items()))
        for label, own in results["systems"].items()
    ]
    lines = [
        f"{len(results['subsets'])} trainings on subsets of {len(results['task_names'])} tasks that go on from the "
        f"adapter for all tasks, for {results['length']:g} of a whole training; one seed.",
        "",
        *markdown_table(("prediction by", *(title for title, _ in COLUMNS.values())), rows),
    ]
    return "\n".join(lines) + "\n"
