"""Markdown tables of trainings at once and one after the other."""

import statistics

from ..common import markdown_table


def table(results: dict) -> str:
    machine, shape = results["machine"], results["shape"]
    few, many = shape["lengths"]
    lines = [
        f"LoRA of rank {shape['rank']} on every linear layer, rows of {few} to {many} tokens, {shape['steps']} steps, "
        f"{shape['repetitions']} repetitions; {machine['device']}, {machine['threads']} thread(s). Median seconds "
        "of CPU time of all trainings; how many times as fast is the median of the ratios of a turn, and the last "
        "column the largest difference of weights that were trained in the two ways.",
        "",
    ]
    header = ("model", "rows in a step", "adapters", "one after the other", "at once", "times as fast", "difference")
    rows = [
        (
            own["model"],
            own["batch_size"],
            own["adapters"],
            f"{statistics.median(own['alone']):.2f}",
            f"{statistics.median(own['at_once']):.2f}",
            f"{own['ratio']:.2f}",
            f"{own['difference']:.0e}",
        )
        for own in results["settings"]
    ]
    return "\n".join([*lines, *markdown_table(header, rows)]) + "\n"
