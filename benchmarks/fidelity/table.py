"""Turn the report of `hf-ensemble fidelity` into the JSON, the table and the picture that are kept beside this file.

python benchmarks/fidelity_table.py OUTPUT_DIR/estimate benchmarks/fidelity_real_tasks
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np


def cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def by_size(report: dict) -> list[str]:
    """Error and coverage by the number of tasks in the subset."""
    predicted, true, low, high = (
        np.array(report[key]) for key in ("predicted_loss", "true_loss", "loss_low", "loss_high")
    )
    sizes = np.array([len(subset) for subset in report["subsets"]])
    lines = ["| tasks in the subset | subsets | mean relative error | inside of the interval |", "|---|---|---|---|"]
    for size in np.unique(sizes):
        rows = sizes == size
        error = np.mean(np.abs(predicted[rows] - true[rows]) / true[rows])
        inside = np.mean((low[rows] <= true[rows]) & (true[rows] <= high[rows]))
        lines.append(f"| {size} | {rows.sum()} | {error:.1%} | {inside:.0%} |")
    return lines


def table(report: dict) -> str:
    rows = [
        ("subsets fine-tuned for real", str(len(report["subsets"]))),
        ("runs that calibrate", str(len(report["calibration_subsets"]))),
        ("mean relative error of the loss", cell(report["mean_relative_error"], ".1%")),
        ("mean error of the accuracy", cell(report["mean_accuracy_error"], ".3f")),
        ("mean per-task Spearman", cell(report["mean_task_spearman"], ".3f")),
        ("over subsets that hold the task", cell(report["mean_task_spearman_inside"], ".2f")),
        ("over subsets that do not", cell(report["mean_task_spearman_outside"], ".2f")),
        ("correlation of losses", cell(report["correlation"], ".3f")),
        ("correlation of their changes by training", cell(report["change_correlation"], ".3f")),
        (f"inside of {report['interval_level']:.0%} intervals", cell(report["interval_coverage"], ".0%")),
        ("time of 100 trainings / (capture and 100 predictions)", cell(report["speed_up"], ".0f")),
    ]
    if report["ceiling"]:
        ceiling = report["ceiling"]
        rows += [
            ("subsets trained with a second seed", str(ceiling["num_subsets"])),
            ("relative error of the other seed", cell(ceiling["mean_relative_error"], ".1%")),
            ("Spearman of the other seed (ceiling)", cell(ceiling["mean_task_spearman"], ".3f")),
            ("Spearman of the predictions on these subsets", cell(ceiling["predicted_mean_task_spearman"], ".3f")),
        ]
    if report["first_order"]:
        first = report["first_order"]
        rows += [
            ("first-order error of the margins at theta0 + S P w (squared)", cell(first["squared_error"], ".2%")),
            ("first-order error of the losses there", cell(first["loss_relative_error"], ".1%")),
            (
                "distance of theta0 + S P w, of the true training",
                f"{first['transplanted_distance']:.2f}, {first['training_distance']:.2f}",
            ),
        ]
    lines = [
        "| measure | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        *by_size(report),
    ]
    lines += ["", "| task | Spearman |", "|---|---|"]
    lines += [f"| {task} | {cell(value, '.2f')} |" for task, value in report["task_spearman"].items()]
    return "\n".join(lines) + "\n"


def main(source: str, target: str) -> None:
    report = json.loads((Path(source) / "fidelity.json").read_text())
    Path(f"{target}.json").write_text(json.dumps(report, indent=1) + "\n")
    Path(f"{target}.md").write_text(table(report))
    shutil.copy(Path(source) / "fidelity.png", f"{target}.png")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
