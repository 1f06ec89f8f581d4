"""Markdown table of the ablation."""

from ..common import formatted, markdown_table

REFERENCE = {
    "linearised at": "theta0",
    "margin": "geometric_mean",
    "preconditioner": "adam",
    "projection": "4096, seed 0",
    "components": 400,
    "training rows": "all",
    "steps": "of each mixture",
    "growth": "of A",
    "evidence": "2 runs",
    "rows": "by their tokens",
    "calibration": "of each task",
}


HEADER = (
    "variant",
    "mean relative error",
    "per-task Spearman",
    "subsets with the task",
    "subsets trained twice",
    "correlation",
    "correlation of changes",
    "coverage of 90 % intervals",
)


def table(results: dict) -> str:
    top = results["ceiling"]
    rows = [_row(variant) for variant in results["variants"]]
    rows.append(
        (
            "real training, second seed",
            f"{top['mean_relative_error']:.1%}",
            "-",
            f"{top['mean_task_spearman_inside']:.3f}",
            f"{top['mean_task_spearman']:.3f}",
            *("-" * 3),
        )
    )
    lines = [
        f"{results['num_subsets']} subsets, {top['num_subsets']} of them trained twice. Reference: "
        + ", ".join(f"{key} {value}" for key, value in REFERENCE.items())
        + ". Each variant changes one of these.",
        "",
        *markdown_table(HEADER, rows),
    ]
    return "\n".join(lines) + "\n"


def changes(choice: dict) -> dict:
    """Where a variant differs from the reference."""
    return {key: value for key, value in choice.items() if value != REFERENCE[key]}


def _row(variant: dict) -> tuple[str, ...]:
    changed, result = changes(variant["choice"]), variant["result"]
    return (
        ", ".join(f"{key}: {value}" for key, value in changed.items()) or "reference",
        f"{result['mean_relative_error']:.1%}",
        f"{result['mean_task_spearman']:.3f}",
        f"{result['mean_task_spearman_inside']:.3f}",
        f"{result['mean_task_spearman_repeated']:.3f}",
        f"{result['correlation']:.3f}",
        f"{result['change_correlation']:.3f}",
        formatted(result["interval_coverage"], ".0%"),
    )
