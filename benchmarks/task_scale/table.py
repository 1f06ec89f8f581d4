"""Markdown table of time and memory by number of tasks."""

from ..common import markdown_table

_CHOSEN = {"select": "tasks", "mixture": "tasks with a weight", "group": "groups", "mixtures": "adapters"}
_NAMES = {
    "select": "selection without a limit",
    "mixture": "mixture",
    "group": "direct grouping",
    "mixtures": "mixtures",
}


def table(results: dict) -> str:
    header = ("choice", "tasks", "rows a task", "seconds", "peak memory", "chosen", "predicted loss")
    rows = [
        (
            _NAMES[line["choice"]],
            f"{line['tasks']:,}",
            line["rows"],
            f"{line['seconds']:.1f}",
            f"{line['peak_resident_bytes'] / 1e9:.2f} GB",
            f"{line['chosen']} {_CHOSEN[line['choice']]}",
            f"{line['predicted_loss']:.4f}",
        )
        for line in results["choices"]
    ]
    made = {
        (line["tasks"], line["rows"]): line["seconds_to_reduce_and_calibrate"]
        for line in sorted(results["choices"], key=lambda line: line["seconds_to_reduce_and_calibrate"])
    }
    lines = [
        f"As many validation as training rows a task, {results['dim']} dimensions, {results['machine']['threads']} "
        f"thread(s). Mixtures have a budget of {results['budget']:g} trainings of one adapter for all, and their loss "
        "is the expected one. The memory is that of the whole process. Before each choice, the features are reduced "
        "and the predictions calibrated: "
        + ", ".join(f"{made[key]:.1f} s for {key[0]:,} tasks of {key[1]} rows" for key in sorted(made))
        + ".",
        "",
    ]
    return "\n".join([*lines, *markdown_table(header, rows)]) + "\n"
