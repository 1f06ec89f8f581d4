"""The sentence that a run ends with, in every case."""

from dataclasses import replace

import numpy as np
import pytest

from hf_ensemble.evaluate import RowScores, TaskScores
from hf_ensemble.runs import Results, RunRecord, SelectionResult
from hf_ensemble.runs.verdict import number

NAMES = ["sums", "diffs", "words"]


def rows_of(losses, noise=0.01, size=60, seed=0):
    """Rows of each task with these mean losses."""
    generator = np.random.default_rng(seed)
    shared = {task: generator.normal(0.0, 0.3, size) for task in losses}
    found = {}
    for task, loss in losses.items():
        own = shared[task] + noise * generator.normal(size=size)
        found[task] = RowScores(loss + own - own.mean(), np.zeros(size))
    return found


def results_of(systems, noise=0.01, has_rows=True, **outcome):
    rows = {system: rows_of(losses, noise, seed=0) for system, losses in systems.items()}
    # Systems differ in their noise alone.
    for seed, own in enumerate(rows.values()):
        generator = np.random.default_rng(seed + 1)
        for task, one in own.items():
            shift = noise * generator.normal(size=len(one.loss))
            own[task] = replace(one, loss=one.loss + shift - shift.mean())
    scores = {system: {task: one.summary() for task, one in own.items()} for system, own in rows.items()}
    return Results.of(RunRecord({}, {}, {}), "eval", scores, rows if has_rows else None, **outcome)


def losses(*values):
    return dict(zip(NAMES, values))


def weights(*adapters):
    return {task: {adapter: 1.0} for task, adapter in zip(NAMES, adapters)}


BASE, BASELINE = losses(5.0, 5.0, 5.0), losses(2.0, 2.0, 2.0)
CASES = {
    "the ensemble is better": (
        {"base": BASE, "baseline": BASELINE, "ensemble": losses(1.5, 1.6, 1.7)},
        {"weights": weights("group_0", "group_1", "group_2")},
        "Three adapters lower the loss on 3 of 3 tasks, from 2.000 to 1.600 nats on average.",
    ),
    "a scale gives the baseline a part of the gain": (
        {"base": BASE, "baseline": BASELINE, "ensemble": losses(1.5, 1.6, 1.7)},
        {
            "weights": weights("group_0", "group_1", "group_2"),
            "scaled_loss": {"baseline": 1.9, "ensemble": 1.65},
        },
        "Three adapters lower the loss on 3 of 3 tasks, from 2.000 to 1.600 nats on average. With a scale of its "
        "logits, the one adapter for all has 1.900 on validation rows that the scale was not fitted to, and the "
        "ensemble 1.650.",
    ),
    "a scale gives the baseline as much": (
        {"base": BASE, "baseline": BASELINE, "ensemble": losses(1.5, 1.6, 1.7)},
        {
            "weights": weights("group_0", "group_1", "group_2"),
            "scaled_loss": {"baseline": 1.64, "ensemble": 1.65},
        },
        "One adapter is enough for these 3 datasets: with a scale of its logits, the one for all has 1.640 on "
        "validation rows that the scale was not fitted to, and the ensemble 1.650.",
    ),
    "a scale gives it next to nothing": (
        {"base": BASE, "baseline": BASELINE, "ensemble": losses(1.5, 1.6, 1.7)},
        {
            "weights": weights("group_0", "group_1", "group_2"),
            "scaled_loss": {"baseline": 1.99, "ensemble": 1.65},
        },
        "Three adapters lower the loss on 3 of 3 tasks, from 2.000 to 1.600 nats on average.",
    ),
    "better, but for one task": (
        {"base": BASE, "baseline": BASELINE, "ensemble": losses(1.5, 1.6, 2.2)},
        {"weights": weights("group_0", "group_1", "group_1")},
        "Two adapters lower the loss on 2 of 3 tasks, from 2.000 to 1.767 nats on average; words does worse.",
    ),
    "one adapter beside the baseline": (
        {"base": BASE, "baseline": BASELINE, "ensemble": losses(1.5, 1.5, 1.5)},
        {"weights": weights("group_0", "group_0", "group_0")},
        "One adapter lowers the loss on 3 of 3 tasks, from 2.000 to 1.500 nats on average.",
    ),
    "the baseline, trained further": (
        {"base": BASE, "baseline": BASELINE, "ensemble": losses(1.5, 1.5, 1.5)},
        {"weights": weights("group_0", "group_0", "group_0"), "continues_baseline": True},
        "One adapter is enough for these 3 datasets: the one for all, trained further, lowers the loss on 3 of 3 "
        "tasks, from 2.000 to 1.500 nats on average.",
    ),
    "the baseline, trained further, is worse on one": (
        {"base": BASE, "baseline": BASELINE, "ensemble": losses(1.5, 1.5, 2.1)},
        {"weights": weights("group_0", "group_0", "group_0"), "continues_baseline": True},
        "The adapter for all, trained further, lowers the loss on 2 of 3 tasks, from 2.000 to 1.700 nats on average; "
        "words does worse.",
    ),
    "the ensemble is the baseline": (
        {"base": BASE, "baseline": BASELINE, "ensemble": BASELINE},
        {"weights": weights("baseline", "baseline", "baseline"), "equals_baseline": True},
        "One adapter is enough for these 3 datasets: every one of them is served best by the adapter that was trained "
        "on all, so the ensemble is that adapter.",
    ),
    "one group": (
        {"base": BASE, "baseline": BASELINE, "ensemble": BASELINE},
        {"weights": weights("group_0", "group_0", "group_0"), "equals_baseline": True, "groups": {"group_0": NAMES}},
        "One adapter is enough for these 3 datasets: the grouping put all of them into one group, so the ensemble "
        "is the one adapter for all.",
    ),
    "worse": (
        {"base": BASE, "baseline": BASELINE, "ensemble": losses(2.5, 2.4, 1.9)},
        {"weights": weights("group_0", "group_1", "group_1")},
        "Use the one adapter for all: the ensemble raises the loss from 2.000 to 2.267 nats on average, and on 2 of 3 "
        "tasks.",
    ),
    "fine-tuning hurts": (
        {"base": losses(1.0, 1.0, 1.0), "baseline": BASELINE, "ensemble": losses(1.5, 1.6, 1.7)},
        {"weights": weights("group_0", "group_1", "group_1")},
        "Fine-tuning did not help: the base model's mean loss is 1.000, that of the ensemble 1.600. Lower the learning "
        "rate, or train for fewer steps.",
    ),
    "no baseline": (
        {"base": BASE, "ensemble": losses(1.5, 1.6, 1.7)},
        {"weights": weights("group_0", "group_1", "group_1")},
        "Two adapters lower the base model's loss on 3 of 3 tasks, from 5.000 to 1.600 nats on average. Whether one "
        "adapter for all would do as well was not tried: set train_baseline=True.",
    ),
    "worse than the base model, which one adapter for all is not": (
        {"base": BASELINE, "baseline": losses(1.5, 1.5, 1.5), "ensemble": losses(2.5, 2.4, 2.6)},
        {"weights": weights("group_0", "group_1", "group_1")},
        "Use the one adapter for all: the ensemble raises the loss from 1.500 to 2.500 nats on average, and on 3 of 3 "
        "tasks.",
    ),
    "one adapter without a baseline": (
        {"base": BASE, "ensemble": losses(1.5, 1.5, 5.4)},
        {"weights": weights("group_0", "group_0", "group_0")},
        "One adapter lowers the base model's loss on 2 of 3 tasks, from 5.000 to 2.800 nats on average; words does "
        "worse. Whether one adapter for all would do as well was not tried: set train_baseline=True.",
    ),
    "the ensemble alone": (
        {"ensemble": losses(1.5, 1.6, 1.7)},
        {},
        "The ensemble's mean loss is 1.600; nothing else was scored to compare it with.",
    ),
    "one task hurts": (
        {"base": BASE, "baseline": BASELINE, "ensemble": losses(1.5, 1.6, 1.7)},
        {"weights": weights("group_0", "group_1", "group_1"), "harmful": {"words": 2}},
        "Two adapters lower the loss on 3 of 3 tasks, from 2.000 to 1.600 nats on average. words is predicted to hurt "
        "all others: leave it out.",
    ),
    "two tasks hurt": (
        {"base": BASE, "baseline": BASELINE, "ensemble": BASELINE},
        {"equals_baseline": True, "harmful": {"words": 1, "sums": 2}},
        "words and sums are predicted to hurt the others: leave them out.",
    ),
    "one task hurts some": (
        {"base": BASE, "baseline": BASELINE, "ensemble": BASELINE},
        {"equals_baseline": True, "harmful": {"words": 1}},
        "words is predicted to hurt 1 of 2 others: leave it out.",
    ),
}


@pytest.mark.parametrize("has_rows", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_ensembles(case, has_rows):
    systems, outcome, expected = CASES[case]
    results = results_of(systems, has_rows=has_rows, **outcome)
    assert results.verdict.endswith(expected) if "hurt" in expected else results.verdict == expected
    assert str(results).startswith(results.verdict)


def test_differences_within_their_noise_call_for_one_adapter():
    systems = {"base": BASE, "baseline": BASELINE, "ensemble": losses(1.98, 2.01, 1.99)}
    results = results_of(systems, noise=1.0, weights=weights("group_0", "group_1", "group_1"))
    low, high = results.intervals["ensemble"].mean_difference["loss"].interval
    assert low < 0 < high
    assert results.verdict == (
        "One adapter is enough for these 3 datasets: two adapters move the loss from 2.000 to 1.993 nats on average, "
        f"which other rows might undo (95 % interval of the difference {number(low)} to {number(high)})."
    )
    systems["ensemble"] = losses(1.0, 2.4, 2.5)
    results = results_of(systems, noise=1.0, weights=weights("group_0", "group_1", "group_1"))
    assert results.verdict.startswith("One adapter is enough") and results.verdict.endswith(" sums clearly gains.")


@pytest.mark.parametrize("loss", [4.99, 5.01])
def test_nothing_is_lowered_within_the_noise_where_no_baseline_was_trained(loss):
    systems = {"base": BASE, "ensemble": losses(loss, loss, loss)}
    results = results_of(systems, noise=1.0, weights=weights("group_0", "group_1", "group_1"))
    low, high = results.intervals["ensemble"].mean_difference["loss"].interval
    assert low < 0 < high
    assert results.verdict == (
        f"Two adapters move the base model's loss from 5.000 to {loss:.3f} nats on average, which other rows might "
        f"undo (95 % interval of the difference {number(low)} to {number(high)}). Whether one adapter for all would do "
        "as well was not tried: set train_baseline=True."
    )


SELECTION = SelectionResult(["sums"], ["sums", "diffs", "words"], "", 0.5, {"alone": 0.9, "all": 0.7})


@pytest.mark.parametrize(
    "selection, measured, expected",
    [
        (
            SELECTION,
            0.55,
            "diffs and words help sums: predicted 0.500 with them, 0.900 alone. The loss of sums is 0.550, from the "
            "base model's 5.000.",
        ),
        (
            replace(SELECTION, tasks=["sums", "diffs"]),
            0.55,
            "diffs helps sums: predicted 0.500 with it, 0.900 alone. The loss of sums is 0.550, from the base model's "
            "5.000.",
        ),
        (
            replace(SELECTION, tasks=["sums"]),
            0.55,
            "No other dataset is predicted to help sums, which was fine-tuned alone. The loss of sums is 0.550, from "
            "the base model's 5.000.",
        ),
        (
            SELECTION,
            6.0,
            "Fine-tuning did not help sums: the loss is 6.000, that of the base model 5.000. Lower the learning rate, "
            "or train for fewer steps.",
        ),
        (
            replace(SELECTION, predicted_loss=None),
            0.55,
            "sums was fine-tuned with diffs and words. The loss of sums is 0.550, from the base model's 5.000.",
        ),
        (
            replace(SELECTION, predicted_loss=0.95),
            0.55,
            "diffs and words are not predicted to help sums: 0.950 with them, 0.900 alone. The loss of sums is 0.550, "
            "from the base model's 5.000.",
        ),
        (
            replace(SELECTION, targets=["sums", "diffs"]),
            0.5,
            "words helps sums and diffs: predicted 0.500 with it, 0.900 alone. The mean loss of sums and diffs is "
            "0.750, from the base model's 5.000.",
        ),
        (
            replace(SELECTION, targets=["sums", "diffs"], tasks=["sums", "diffs"]),
            0.5,
            "No other dataset is predicted to help sums and diffs, which were fine-tuned alone. The mean loss of sums "
            "and diffs is 0.750, from the base model's 5.000.",
        ),
    ],
)
def test_selections(selection, measured, expected):
    systems = {"base": BASE, "selection": losses(measured, 1.0, 1.0)}
    assert results_of(systems, selection=selection).verdict == expected


def test_no_table_of_zeros_where_losses_moved():
    results = results_of({"base": BASE, "baseline": BASELINE, "ensemble": losses(1.5, 1.6, 1.7)})
    (table,) = results.tables()
    assert table.title.startswith("Loss") and table.columns == ["task", "base model", "one adapter for all", "ensemble"]
    assert [row[0] for row in table.rows] == NAMES and table.rows[0][3].startswith("1.500 (1.4")
    assert table.mean[3].startswith("1.600 (")
    # With one right row, the accuracies say something.
    right = {task: TaskScores(1.0, 0.1, 10) for task in NAMES}
    mixed = Results.of(RunRecord({}, {}, {}), "test", {"base": right, "ensemble": right})
    assert [own.title for own in mixed.tables()] == [
        "Loss (nats per token, lower is better) on test rows",
        "Accuracy on test rows",
    ]
    assert mixed.tables()[1].rows[0] == ["sums", "0.100", "0.100"]


def test_results_read_back(tmp_path):
    results = results_of(
        {"base": BASE, "baseline": BASELINE, "ensemble": losses(1.5, 1.6, 1.7)},
        weights=weights("group_0", "group_1", "group_1"),
        harmful={"words": 2},
        selection=SELECTION,
    )
    results.save(tmp_path / "results.json")
    again = Results.load(tmp_path / "results.json")
    assert again == results and again.verdict == results.verdict
    # Scores of single rows have a file of their own.
    assert '"rows"' not in (tmp_path / "results.json").read_text()
