"""Markdown table of time and memory by number of tasks."""

from ..common import markdown_table

_CHOSEN = {
    "select": "tasks",
    "mixture": "tasks with a weight",
    "group": "groups",
    "mixtures": "adapters",
    "lengths": "adapters",
}
_NAMES = {
    "select": "selection without a limit",
    "mixture": "mixture",
    "group": "direct grouping",
    "mixtures": "mixtures",
    "lengths": "mixtures that go on, of four lengths",
}


def table(results: dict) -> str:
    header = (
        "choice",
        "tasks",
        "rows a task",
        "threads",
        "seconds",
        "CPU seconds",
        "peak memory",
        "chosen",
        "predicted loss",
    )
    rows = [
        (
            _NAMES[line["choice"]],
            f"{line['tasks']:,}",
            f"{line['rows']:,}",
            line.get("threads", results["machine"]["threads"]),
            f"{line['seconds']:.1f}",
            _seconds(line, "cpu_seconds"),
            f"{line['peak_resident_bytes'] / 1e9:.2f} GB",
            f"{line['chosen']} {_CHOSEN[line['choice']]}",
            f"{line['predicted_loss']:.4f}",
        )
        for line in results["choices"]
    ]
    made = {
        (line["tasks"], line["rows"]): line
        for line in sorted(results["choices"], key=lambda line: line["seconds_to_reduce_and_calibrate"])
    }
    lines = [
        f"As many validation as training rows a task, {results['dim']} dimensions. Mixtures have a budget of "
        f"{results['budget']:g} trainings of one adapter for all, and their loss "
        "is the expected one. The memory is that of the whole process. Before each choice, the features are reduced "
        "and the predictions calibrated: "
        + ", ".join(f"{_made(made[key])} for {key[0]:,} tasks of {key[1]:,} rows" for key in sorted(made))
        + ". CPU seconds are the sum over threads.",
        "",
    ]
    return "\n".join([*lines, *markdown_table(header, rows)]) + "\n"


def _seconds(line: dict, name: str) -> str:
    return f"{line[name]:.1f}" if name in line else "-"


def _made(line: dict) -> str:
    cpu = line.get("cpu_seconds_to_reduce_and_calibrate")
    seconds = f"{line['seconds_to_reduce_and_calibrate']:.1f} s"
    return seconds if cpu is None else f"{seconds} ({cpu:.1f} CPU seconds)"
