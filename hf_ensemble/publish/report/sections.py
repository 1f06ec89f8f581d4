"""The parts of the page, each from the records that it shows."""

from collections.abc import Iterator
from functools import partial

from ...runs import Estimate, Results, RunDirectory, TasksRecord
from ...runs.layout import SCORED_TRAINING
from ...runs.systems import main_system, system_name
from ...runs.verdict import number
from ...select import Grouping, Selection
from .. import pictures
from . import charts
from .choices import affinity_section, groups_section, harm_section, selection_section
from .costs import cost_tables
from .section import MOST_ROWS, Section
from .tables import Cell, PageTable, result_page_tables, signed


def sections_of(run: RunDirectory, results: Results) -> Iterator[Section]:
    """Every part of the page; those without pictures and tables have nothing to show."""
    estimate, grouping = run.read_if_there(Estimate), run.read_if_there(Grouping)
    is_selection = "selection" in results.scores
    main = main_system(results.scores)
    yield _results_section(results, main, grouping if not is_selection else None)
    if not is_selection and grouping is not None:
        yield groups_section(run, grouping, results.weights)
        yield affinity_section(grouping)
    selection = run.read_if_there(Selection) if is_selection else None
    if selection is not None:
        yield selection_section(selection)
    yield _prediction_section(results, main)
    if estimate is not None and not is_selection:
        yield harm_section(estimate)
    yield _training_section(run)
    yield Section("costs", "What it cost", tables=cost_tables(results))
    yield _data_section(run)


def _results_section(results: Results, main: str, grouping: Grouping | None) -> Section:
    rows = "test rows" if results.split == "test" else "evaluation rows, by which choices were made"
    section = Section(
        "results",
        "Results",
        f"On {'the held-out ' if results.split == 'test' else 'the '}{rows}. Intervals hold 95 % of what other rows of "
        "the same kind would give; differences are paired row by row.",
    )
    tasks = results.scores[main]
    own = results.intervals.get(main)
    if own is not None and own.differences and len(tasks) <= MOST_ROWS:
        reference = system_name(results.reference)
        section.draw(
            f"How much each task's loss differs from {reference}. Grey intervals hold zero: chance may explain them.",
            f"Differences of the loss from {reference} by task; the table below has the figures.",
            partial(charts.difference_chart, results, main),
        )
    if len(tasks) <= MOST_ROWS:
        section.draw(
            "Loss of each task and system with its interval.",
            "Losses by task and system; the table below has the figures.",
            partial(charts.loss_chart, results),
        )
    groups = {task: name for name, own in grouping.groups.items() for task in own} if grouping is not None else {}
    section.tables = result_page_tables(results, groups)
    return section


def _prediction_section(results: Results, main: str) -> Section:
    section = Section(
        "predictions",
        "Predicted against measured",
        "Predictions are made before the adapters are trained"
        + (", of each task under its group's adapter; the ensemble may do better." if main == "ensemble" else "."),
    )
    measured = {task: own.loss for task, own in results.scores[main].items()}
    shared = [task for task in results.predicted_loss if task in measured]
    if len(shared) > 2:
        section.draw(
            "Predicted loss of each task against the measured one; on the line they are equal.",
            "Predicted against measured losses; the table has the figures.",
            partial(
                pictures.prediction_picture, {task: (results.predicted_loss[task], measured[task]) for task in shared}
            ),
        )
    rows = []
    for task in shared:
        predicted, true = results.predicted_loss[task], measured[task]
        error = predicted - true
        rows.append(
            [Cell(task), Cell(number(predicted), predicted), Cell(number(true), true), Cell(signed(error), error)]
        )
    if rows:
        section.tables.append(PageTable("Losses", ["task", "predicted", "measured", "predicted minus measured"], rows))
    if results.fidelity is not None:
        report = results.fidelity
        section.draw(
            f"{len(report.subsets)} subsets that were fine-tuned to check the predictions: mean relative error "
            f"{report.mean_relative_error:.1%}.",
            "Predicted against true losses of subsets that were fine-tuned.",
            partial(pictures.fidelity_picture, report),
        )
    return section


def _training_section(run: RunDirectory) -> Section:
    section = Section("training", "Trainings")
    trainings = [own for own in run.trainings() if not own.name.startswith(SCORED_TRAINING)]
    known = run.read_if_there(TasksRecord)
    curves = charts.curves_of(trainings, [] if known is None else list(known.tasks))
    if curves:
        section.draw(
            "Losses while training, by task: the adapter for all in orange, others in blue; dashed with points on "
            "evaluation rows.",
            "Losses of each task while training.",
            partial(charts.curves_chart, curves),
        )
    elif any("loss" in entry for own in trainings for entry in own.log_history):
        section.draw(
            "Loss of each training.", "Loss of each training by step.", partial(charts.training_chart, trainings)
        )
    rows = [
        [
            Cell(own.name),
            Cell(", ".join(task for task, weight in own.mixture.items() if weight > 0)),
            Cell(f"{own.num_examples:,}", own.num_examples),
            Cell(f"{own.global_step:,}", own.global_step),
            Cell("-" if own.training_loss is None else number(own.training_loss), own.training_loss),
            Cell(number(own.distance), own.distance),
        ]
        for own in run.trainings()
    ]
    if rows:
        columns = ["training", "on", "rows", "steps", "mean loss", "distance moved"]
        section.tables.append(PageTable("Trainings", columns, rows))
    return section


def _data_section(run: RunDirectory) -> Section:
    section = Section("data", "Datasets")
    known = run.read_if_there(TasksRecord)
    if known is None:
        return section
    tasks = known.tasks
    splits = list(dict.fromkeys(split for own in tasks.values() for split in own.num_rows))
    rows = [
        [
            Cell(name),
            *(
                Cell(f"{own.num_rows[split]:,}", own.num_rows[split]) if split in own.num_rows else Cell("-")
                for split in splits
            ),
            Cell(f"{own.sampling_weight:.3g}", own.sampling_weight),
            Cell(", ".join(own.label_names or []) or "-"),
        ]
        for name, own in tasks.items()
    ]
    columns = ["task", *(f"{split} rows" for split in splits), "sampling weight", "labels"]
    section.tables.append(PageTable("Datasets", columns, rows))
    return section
