"""Markdown tables of the time that fine-tuning, capture and prediction take."""

from ..common import markdown_table


def table(results: dict) -> str:
    trainings = zip(results["subsets"], results["training_seconds"])
    lines = [
        *markdown_table(
            ("fine-tuned on", "seconds"),
            ((f"{len(subset)} task{'s' * (len(subset) > 1)}", f"{seconds:.1f}") for subset, seconds in trainings),
        ),
        "",
        *markdown_table(
            ("step", "seconds"),
            [
                ("capture of all rows", f"{results['capture_seconds']:.1f}"),
                (f"prediction of these {len(results['subsets'])} subsets", f"{results['prediction_seconds']:.3f}"),
                ("calibration runs", f"{results['calibration_seconds']:.1f}"),
            ],
        ),
        "",
        f"Fine-tuning on 100 such subsets takes {results['speed_up']:.0f} times as long as the capture and 100 "
        "predictions; calibration runs are not counted.",
    ]
    return "\n".join(lines) + "\n"
