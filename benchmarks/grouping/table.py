"""Markdown table of grouping methods."""

import numpy as np

from ..common import markdown_table, mean_and_deviation

HEADER = ("method", "groups", "predicted validation loss", "test accuracy", "test loss")


def table(results: dict) -> str:
    num_tasks = len(results["ways"][0]["scores"][0]) - len(results["left_out_of_means"])
    rows = [
        (
            row["way"],
            row["num_groups"],
            f"{np.mean(row['predicted_loss']):.4f}",
            mean_and_deviation(row["accuracy"]),
            mean_and_deviation(row["loss"]),
        )
        for row in results["ways"]
    ]
    lines = [
        f"Test rows of {num_tasks} tasks: mean over {len(results['seeds'])} seeds ± standard deviation.",
        "",
        *markdown_table(HEADER, rows),
    ]
    return "\n".join(lines) + "\n"
