"""Markdown table of time and memory by number of tasks."""

from ..common import markdown_table

_CHOSEN = {"select": "tasks", "mixture": "tasks with a weight", "group": "groups"}
_NAMES = {"select": "selection without a limit", "mixture": "mixture", "group": "direct grouping"}


def table(results: dict) -> str:
    header = ("choice", "tasks", "seconds", "peak memory", "chosen", "predicted loss")
    rows = [
        (
            _NAMES[line["choice"]],
            f"{line['tasks']:,}",
            f"{line['seconds']:.1f}",
            f"{line['peak_resident_bytes'] / 1e9:.2f} GB",
            f"{line['chosen']} {_CHOSEN[line['choice']]}",
            f"{line['predicted_loss']:.4f}",
        )
        for line in results["choices"]
    ]
    made = {line["tasks"]: line["seconds_to_reduce_and_calibrate"] for line in results["choices"]}
    lines = [
        f"{results['rows']} training and {results['rows']} validation rows a task, {results['dim']} dimensions, "
        f"{results['machine']['threads']} thread(s). The memory is that of the whole process. Before each choice, the "
        "features are reduced and the predictions calibrated: "
        + ", ".join(f"{seconds:.1f} s for {tasks:,} tasks" for tasks, seconds in sorted(made.items()))
        + ".",
        "",
    ]
    return "\n".join([*lines, *markdown_table(header, rows)]) + "\n"
