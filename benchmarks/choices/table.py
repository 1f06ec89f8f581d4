"""Markdown tables of predicted against true losses of ensembles, and of the regret of choices."""

import numpy as np

from ..common import markdown_table

HEADER = ("ensemble", "adapters", "cost", "predicted", "expected", "true, validation", "true, test", "test, reassigned")


def _row(line: dict) -> tuple:
    expected = line["expected_loss"]
    return (
        line["label"],
        line["num_mixtures"] + 1,
        f"{line['cost']:.2f}",
        f"{line['predicted_loss']:.4f}",
        "-" if expected is None else f"{expected:.4f}",
        *(f"{line['true'][split]:.4f}" for split in ("validation", "test", "test_reassigned")),
    )


def _error(lines: list[dict], name: str, split: str) -> float:
    return float(np.mean([abs(line[name] / line["true"][split] - 1) for line in lines]))


def table(results: dict) -> str:
    choices, others = results["choices"], results["others"]
    chosen, after = results["chosen"], results["one_after_the_other"]
    together = results["baseline"]["true"]
    best = {split: min(line["true"][split] for line in others) for split in ("validation", "test")}
    gain = {split: together[split] - best[split] for split in best}
    errors = {
        split: f"predicted {_error(choices, 'predicted_loss', split):.1%}, expected "
        f"{_error(choices, 'expected_loss', split):.1%}"
        for split in gain
    }
    lines = [
        "Mean losses over the tasks, each task served by the adapter that was chosen for it, or (reassigned) by the "
        "one with the least validation loss. The cost is the rows that all trainings draw, in multiples of one adapter "
        "for all, which is a member of each ensemble.",
        "",
        "## As good as predicted?",
        "",
        f"{len(choices)} choices with a random number of mixtures and a random budget. Mean relative error of the loss "
        f"of a whole ensemble on validation rows: {errors['validation']}; on test rows: {errors['test']}.",
        "",
        *markdown_table(HEADER, [_row(results["baseline"]), *map(_row, choices)]),
        "",
        "## The best that could have been?",
        "",
        f"Choices at a budget of {results['budget']:g} against {len(others)} other ensembles of at most this cost, "
        f"of which the best gains {gain['validation']:.4f} nats over one adapter for all on validation rows, and "
        f"{gain['test']:.4f} on test rows. Regret is what a choice loses against it; below 0 it is better than all.",
        "",
        *markdown_table(
            ("choice", *(f"{split} rows: {what}" for split in best for what in ("regret", "others that are better"))),
            [
                (
                    line["label"],
                    *(
                        value
                        for split in best
                        for value in (
                            f"{line['true'][split] - best[split]:.4f}",
                            sum(other["true"][split] < line["true"][split] for other in others),
                        )
                    ),
                )
                for line in (chosen, after)
            ],
        ),
        "",
        *markdown_table(HEADER, [_row(chosen), _row(after), *map(_row, others)]),
    ]
    return "\n".join(lines) + "\n"
