"""Markdown table of accuracies and groups."""

from ..common import markdown_table

SYSTEMS = {"base": "base model", "baseline": "one adapter for all", "ensemble": "ensemble"}


def table(results: dict) -> str:
    scores = results["scores"]
    systems = [system for system in SYSTEMS if system in scores]
    group_of = {task: name for name, tasks in results["groups"].items() for task in tasks}
    rows = [
        [task, group_of[task], *(f"{scores[system][task]['accuracy']:.3f}" for system in systems)]
        for task in scores["ensemble"]
    ]
    rows.append(["**mean**", "", *(f"{results['mean_accuracy'][system]:.3f}" for system in systems)])
    lines = [
        f"Accuracy on {results['split']} rows.",
        "",
        *markdown_table(["task", "group", *(SYSTEMS[system] for system in systems)], rows),
    ]
    return "\n".join(lines) + "\n"
