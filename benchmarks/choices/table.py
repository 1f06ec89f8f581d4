"""Markdown tables of predicted against true losses of ensembles, and of the regret of choices."""

import numpy as np

from ..common import markdown_table

SPLITS = ("validation", "test")
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


def _gains(runs: list[dict]) -> str:
    """Mean gains over one adapter for all: rows of another split may be easier or harder for every system."""

    def mean(of) -> float:
        return float(np.mean([of(run["baseline"]) - of(line) for run in runs for line in run["choices"]]))

    def expected(line: dict) -> float:
        return line["predicted_loss"] if line["expected_loss"] is None else line["expected_loss"]

    true = {split: mean(lambda line, own=split: line["true"][own]) for split in SPLITS}
    predicted = mean(lambda line: line["predicted_loss"])
    return (
        f"Mean gain over one adapter for all, in nats: predicted {predicted:.4f}, expected {mean(expected):.4f}; true "
        f"{true['validation']:.4f} on validation rows and {true['test']:.4f} on test rows."
    )


def table(results: dict) -> str:
    runs = results["runs"]
    choices = [line for run in runs for line in run["choices"]]
    errors = {
        split: f"predicted {_error(choices, 'predicted_loss', split):.1%}, expected "
        f"{_error(choices, 'expected_loss', split):.1%}"
        for split in SPLITS
    }
    scale = " Losses are those left with a scale of each task's outputs, found on its validation rows."
    lines = [
        "Mean losses over the tasks, each task served by the adapter that was chosen for it, or (reassigned) by the "
        "one with the least validation loss. The cost is the rows that all trainings draw, in multiples of one adapter "
        f"for all, which is a member of each ensemble.{scale if results['output_scales'] else ''}",
        "",
        "## As good as predicted?",
        "",
        f"{len(choices)} choices with a random number of mixtures and a random budget. Mean relative error of the loss "
        f"of a whole ensemble on validation rows: {errors['validation']}; on test rows: {errors['test']}.",
        "",
        _gains(runs),
        "",
    ]
    for number, run in enumerate(runs):
        lines += [*_named("Seed", number, runs), *markdown_table(HEADER, map(_row, [run["baseline"], *run["choices"]]))]
        lines += [""]
    lines += ["## The best that could have been?", ""]
    for number, run in enumerate(runs):
        lines += [*_named("Seed", number, runs), *_regrets(run, results["budget"]), ""]
    return "\n".join(lines)


def _named(word: str, number: int, runs: list[dict]) -> list[str]:
    return [f"{word} {number}:", ""] if len(runs) > 1 else []


def _regrets(run: dict, budget: float) -> list[str]:
    others, together = run["others"], run["baseline"]["true"]
    best = {split: min(line["true"][split] for line in others) for split in SPLITS}
    return [
        f"Choices at a budget of {budget:g} against {len(others)} other ensembles of at most this cost, "
        f"of which the best gains {together['validation'] - best['validation']:.4f} nats over one adapter for all on "
        f"validation rows, and {together['test'] - best['test']:.4f} on test rows. Regret is what a choice loses "
        "against it; below 0 it is better than all.",
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
                for line in run["chosen"]
            ],
        ),
        "",
        *markdown_table(HEADER, [*map(_row, run["chosen"]), *map(_row, others)]),
    ]
