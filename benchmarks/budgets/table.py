"""Markdown tables of accuracy by training cost."""

from ..common import formatted, markdown_table

HEADER = (
    "system",
    "seeds",
    "cost",
    "adapters",
    "predicted validation loss",
    "validation loss",
    "test loss",
    "test accuracy",
    "difference",
    "test accuracy, weights",
    "difference",
    "test loss, weights",
    "best on test rows",
)


def table(results: dict) -> str:
    lines = []
    for name, own in results["recipes"].items():
        count = len(own["tasks"])
        lines += [f"## {name}", ""]
        lines += [
            f"Means over the seeds and the test rows of {count} tasks; {_steps(own)} steps for one adapter for all. "
            "The cost is the rows that all trainings draw, in multiples of that adapter's. Each task is served by the "
            "adapter that was made for it, or by weights that its validation rows have chosen, or by the adapter that "
            "is best on its test rows, which nobody knows. Differences of the accuracy, in points, are from one "
            "adapter for all of the same seeds, with 95 % intervals over rows.",
            "",
        ]
        for curve in own["validation_curves"]:
            lines += [
                "Validation loss by epoch, one adapter for all: " + ", ".join(f"{v:.3f}" for v in curve) + ".",
                "",
            ]
        lines += [*markdown_table(HEADER, [_row(system) for system in own["systems"]]), ""]
        if own["unfinished"]:
            lines += [f"Not trained: {'; '.join(own['unfinished'])}.", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _steps(recipe: dict) -> str:
    return " or ".join(str(count) for count in sorted(set(recipe["steps"])))


def _row(system: dict) -> tuple:
    own, weights = system["own"], system["weights"]
    return (
        system["system"],
        system["seeds"],
        f"{system['cost']:.2f}",
        f"{system['adapters']:.1f}",
        formatted(system["predicted_validation_loss"], ".4f"),
        f"{own['validation_loss']:.4f}",
        f"{own['test_loss']:.4f}",
        f"{own['test_accuracy']:.4f}",
        _points(own),
        f"{weights['test_accuracy']:.4f}",
        _points(weights),
        f"{weights['test_loss']:.4f}",
        f"{system['oracle']['test_accuracy']:.4f}",
    )


def _points(way: dict) -> str:
    found = way["differences"].get("accuracy")
    return "" if found is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in found))
