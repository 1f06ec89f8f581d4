"""The parts of the page that show what was chosen, and by which predictions."""

from collections.abc import Mapping
from functools import partial

from ...ensemble.saving.ensemble_config import SavedEnsembleConfig
from ...runs import Estimate, RunDirectory
from ...runs.verdict import number
from ...select import Grouping, Selection
from .. import choice_pictures, mixture_pictures
from . import charts
from .section import MOST_ROWS, Section
from .tables import Cell, PageTable, heat_table, signed

# Tasks from which affinities say more than the losses themselves, and up to which a table of pairs can be read.
_LEAST_AFFINITY, _MOST_AFFINITY = 4, 40


def groups_section(run: RunDirectory, grouping: Grouping, weights: Mapping[str, Mapping[str, float]]) -> Section:
    """Who is served by which adapter, what each is trained on, and the weights of each task."""
    section = Section("groups", "Groups and weights", grouping.summary)
    rows = []
    for name, tasks in grouping.groups.items():
        helpers = grouping.helpers(name)
        is_baseline = name == grouping.baseline_group
        trained = "all tasks: it is the one adapter for all" if is_baseline else ", ".join(grouping.trained_on(name))
        length = grouping.length_of(name)
        rows.append(
            [
                Cell(name),
                Cell(", ".join(tasks)),
                Cell(trained),
                Cell(", ".join(helpers) or "-"),
                Cell(f"{length:g}", length),
            ]
        )
    columns = ["adapter", "serves", "trained on", "of these, helpers", "length of its training"]
    section.tables.append(PageTable("Adapters: whom they serve, and what they are trained on", columns, rows))
    if any(len(set(own.values())) > 1 for own in grouping.mixtures.values()):
        names = list(grouping.mixtures)
        section.tables.append(
            heat_table(
                "How often a row of each task is drawn in each adapter's training, in multiples of its sampling weight",
                "task",
                names,
                {task: [grouping.mixtures[name].get(task, 0.0) for name in names] for task in grouping.task_names},
            )
        )
    if weights:
        used = [name for name in _members(run, weights) if any(row.get(name) for row in weights.values())]
        shown = {task: [row.get(name, 0.0) for name in used] for task, row in weights.items()}
        section.tables.append(heat_table("Weight of each adapter in the sum, by task", "task", used, shown))
    if grouping.cost_curve:
        section.draw(
            "Mean loss that is expected for the training it costs, beside that of one adapter for all.",
            "Expected loss by training cost; the table has the figures.",
            partial(mixture_pictures.cost_curve, grouping),
        )
        section.tables.append(_cost_curve(grouping))
    elif len(grouping.predicted_loss) > 1:
        section.draw(
            "Mean predicted loss by number of groups.",
            f"Mean predicted loss by number of groups; {len(grouping.groups)} were taken.",
            partial(choice_pictures.group_curve, grouping),
        )
    return section


def _cost_curve(grouping: Grouping) -> PageTable:
    """What further adapters are predicted to gain for their training."""
    rows = [
        [
            Cell(f"{point['num_groups']:.0f}"),
            Cell(f"{point['cost']:.2f}", point["cost"]),
            Cell(number(point["predicted_loss"]), point["predicted_loss"]),
            Cell(number(point["expected_loss"]), point["expected_loss"]),
            Cell(
                signed(point["difference"]),
                point["difference"],
                f"{signed(point['difference_low'])} to {signed(point['difference_high'])}",
            ),
        ]
        for point in grouping.cost_curve
    ]
    columns = ["mixtures", "cost, in trainings on all tasks", "mean predicted loss", "expected loss"]
    columns.append("difference to one adapter")
    return PageTable("What further adapters are predicted to gain, less what searching makes of noise", columns, rows)


def _members(run: RunDirectory, weights: Mapping[str, Mapping[str, float]]) -> list[str]:
    if (run.ensemble / "ensemble_config.json").is_file():
        return [member.name for member in SavedEnsembleConfig.load(run.ensemble).members]
    return list(dict.fromkeys(name for row in weights.values() for name in row))


def affinity_section(grouping: Grouping) -> Section:
    """How well tasks train together."""
    section = Section(
        "affinity",
        "Affinity",
        "How much lower than usual a row's task is predicted to end beside a column's, in nats: blue helps, orange "
        "harms. Tasks are ordered by group.",
    )
    names = grouping.task_names
    if not _LEAST_AFFINITY <= len(names) <= _MOST_AFFINITY:
        return section
    ordered = [task for tasks in grouping.groups.values() for task in tasks]
    place = {task: index for index, task in enumerate(names)}
    rows = {
        task: [None if task == other else grouping.affinity[place[task]][place[other]] for other in ordered]
        for task in ordered
    }
    section.tables.append(heat_table("Affinity in nats", "task", ordered, rows, digits=3))
    return section


def selection_section(selection: Selection) -> Section:
    """Which tasks were selected, and how the search came there."""
    section = Section("selection", "Selection", selection.summary)
    if selection.path:
        section.draw(
            "Predicted loss after each step of the search, beside simpler choices.",
            "Predicted loss after each step; the table has the figures.",
            partial(choice_pictures.selection_path, selection),
        )
        rows = []
        for count, step in enumerate(selection.path, start=1):
            change = f"without {step['removed']}" if "removed" in step else str(step.get("added", ""))
            interval = step.get("interval")
            note = f"{number(interval[0])} to {number(interval[1])}" if interval else ""
            close = ", ".join(step.get("close_calls", [])) or "-"
            predicted = Cell(number(step["predicted_loss"]), step["predicted_loss"], note)
            rows.append([Cell(change), Cell(str(count), count), predicted, Cell(close)])
        section.tables.append(
            PageTable("Steps", ["change", "step", "predicted loss", "close calls, which rows cannot tell apart"], rows)
        )
    rows = [
        [
            Cell(task),
            Cell("target" if task in selection.targets else "yes" if task in selection.weights else "no"),
            Cell(f"{selection.weights[task]:.2f}", selection.weights[task]) if task in selection.weights else Cell("-"),
            Cell(number(selection.scores[task]), selection.scores[task]) if task in selection.scores else Cell("-"),
        ]
        for task in dict.fromkeys([*selection.targets, *selection.tasks, *selection.scores])
    ]
    section.tables.append(PageTable("Tasks", ["task", "trained on", "weight", "score (lower is better)"], rows))
    if selection.baselines:
        rows = [[Cell(name.replace("_", " ")), Cell(number(loss), loss)] for name, loss in selection.baselines.items()]
        section.tables.append(PageTable("Simpler choices", ["choice", "predicted loss"], rows))
    return section


def harm_section(estimate: Estimate) -> Section:
    """What each task does to the others."""
    section = Section(
        "harm",
        "What each task does to the others",
        "Predicted change of the others' mean loss if a task is left out of the training on all; orange tasks harm.",
    )
    if 1 < len(estimate.left_out) <= MOST_ROWS:
        section.draw(
            "Tasks to the left of the line harm the others: these do better without them. Bars are 90 % intervals.",
            "Change of the others' mean loss by leaving out each task; the table has the figures.",
            partial(charts.left_out_chart, estimate.left_out),
        )
    rows = [
        [
            Cell(task),
            Cell(signed(own.mean_change, 4), own.mean_change, f"± {own.standard_error:.4f}"),
            Cell(f"{own.num_better} of {own.num_others}", own.num_better),
        ]
        for task, own in estimate.left_out.items()
    ]
    if rows:
        columns = ["task left out", "change of the others' loss (nats)", "others that do better"]
        section.tables.append(PageTable("Each task left out", columns, rows))
    return section
