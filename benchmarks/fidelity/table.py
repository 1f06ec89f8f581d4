"""Markdown tables of predictions against real fine-tuning."""

import numpy as np

from ..common import formatted, markdown_table

SIZES_HEADER = ("tasks in the subset", "subsets", "mean relative error", "coverage of intervals")


def table(report: dict) -> str:
    spearman = [(task, formatted(value, ".2f")) for task, value in report["task_spearman"].items()]
    lines = [
        *markdown_table(("measure", "value"), _measures(report)),
        "",
        *markdown_table(SIZES_HEADER, _sizes(report)),
        "",
        *markdown_table(("task", "Spearman"), spearman),
    ]
    return "\n".join(lines) + "\n"


def _measures(report: dict) -> list[tuple[str, str]]:
    rows = [
        ("fine-tuned subsets", str(len(report["subsets"]))),
        ("calibration runs", str(len(report["calibration_subsets"]))),
        ("mean relative error of the loss", formatted(report["mean_relative_error"], ".1%")),
        ("mean absolute error of the accuracy", formatted(report["mean_accuracy_error"], ".3f")),
        ("mean per-task Spearman", formatted(report["mean_task_spearman"], ".3f")),
        ("over subsets with the task", formatted(report["mean_task_spearman_inside"], ".2f")),
        ("over subsets without the task", formatted(report["mean_task_spearman_outside"], ".2f")),
        ("correlation of losses", formatted(report["correlation"], ".3f")),
        ("correlation of changes in loss", formatted(report["change_correlation"], ".3f")),
        (
            f"coverage of {formatted(report['interval_level'], '.0%')} intervals",
            formatted(report["interval_coverage"], ".0%"),
        ),
        ("time of 100 fine-tuning runs / (capture and 100 predictions)", formatted(report["speed_up"], ".0f")),
    ]
    if report["ceiling"]:
        ceiling = report["ceiling"]
        rows += [
            ("subsets trained with a second seed", str(ceiling["num_subsets"])),
            ("relative error of the second seed", formatted(ceiling["mean_relative_error"], ".1%")),
            ("Spearman of the second seed (ceiling)", formatted(ceiling["mean_task_spearman"], ".3f")),
            ("Spearman of predictions on these subsets", formatted(ceiling["predicted_mean_task_spearman"], ".3f")),
        ]
    if report["first_order"]:
        first = report["first_order"]
        rows += [
            ("first-order error of the margins at theta0 + S P w (squared)", formatted(first["squared_error"], ".2%")),
            ("first-order error of the losses there", formatted(first["loss_relative_error"], ".1%")),
            (
                "distance from theta0 of theta0 + S P w, of real training",
                f"{first['predicted_distance']:.2f}, {first['training_distance']:.2f}",
            ),
        ]
    return rows


def _sizes(report: dict) -> list[tuple]:
    """Error and coverage by subset size."""
    predicted, true, low, high = (
        np.array(report[key]) for key in ("predicted_loss", "true_loss", "loss_low", "loss_high")
    )
    sizes = np.array([len(subset) for subset in report["subsets"]])
    rows = []
    for size in np.unique(sizes):
        held = sizes == size
        error = np.mean(np.abs(predicted[held] - true[held]) / true[held])
        inside = np.mean((low[held] <= true[held]) & (true[held] <= high[held]))
        rows.append((size, held.sum(), f"{error:.1%}", f"{inside:.0%}"))
    return rows
