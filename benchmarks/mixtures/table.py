"""Markdown table of systems by training cost."""

import numpy as np

from ..common import markdown_table

HEADER = (
    "system",
    "adapters",
    "training cost",
    "predicted validation loss",
    "true validation loss",
    "test loss",
    "test accuracy",
    "test accuracy, fitted weights",
)


def table(results: dict) -> str:
    def mean(own: dict, way: str, measure: str) -> float:
        return float(np.mean([scores[measure] for scores in own[way].values()]))

    rows = [
        (
            own["system"],
            len(own["parts"]),
            f"{own['cost']:.2f}",
            f"{own['predicted_loss']:.4f}",
            f"{own['assigned_validation_loss']:.4f}",
            f"{mean(own, 'assigned', 'loss'):.4f}",
            f"{mean(own, 'assigned', 'accuracy'):.4f}",
            f"{mean(own, 'fitted', 'accuracy'):.4f}" if "fitted" in own else "-",
        )
        for own in results["systems"]
    ]
    num_tasks = len(results["systems"][0]["assigned"])
    lines = [
        f"Means over the test rows of {num_tasks} tasks, one seed. The cost is the rows that all trainings draw, in "
        "multiples of one adapter for all. Each task is served by the adapter with the least loss on its validation "
        "rows, or by fitted weights; where weights were not fitted, only adapters that were trained on the task are "
        "candidates.",
        "",
        *markdown_table(HEADER, rows),
    ]
    return "\n".join(lines) + "\n"
