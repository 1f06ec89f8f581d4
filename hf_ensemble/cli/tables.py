"""Tables of the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .._text import counted
from ..ensemble import PeftEnsembleModel
from ..runs import Comparison, FidelityReport, Results
from ..runs.costs import figure_with_prefix
from ..runs.systems import system_name
from ..select import ExampleScores, Grouping, Selection

# About how many points of a curve a table shows.
_MAX_POINTS = 10


def grouping_table(grouping: Grouping, ensemble: PeftEnsembleModel) -> Table:
    """Every adapter with what it was trained on, and the tasks that give it a weight."""
    table = Table(title="Groups, one adapter each", caption=grouping.summary)
    table.add_column("adapter")
    table.add_column("trained on")
    table.add_column("used by")
    for member in ensemble.members:
        users = [task for task, row in ensemble.weights.items() if row.get(member.name, 0) > 0]
        trained_on = "all tasks" if set(member.tasks) == set(grouping.task_names) else ", ".join(member.tasks)
        if member.name in grouping.groups:
            trained_on = _trained_on(grouping, member.name)
        table.add_row(member.name, trained_on, ", ".join(users) or "none")
    return table


def results_tables(results: Results) -> list[Table]:
    """The loss of every system on every task, and a table for each further figure."""
    found = []
    for own in results.tables():
        table = Table(title=own.title)
        for column in own.columns:
            table.add_column(column, justify="left" if column == "task" else "right")
        for row in own.rows:
            table.add_row(*row)
        table.add_section()
        table.add_row(*own.mean, style="bold")
        found.append(table)
    return found


def cost_tables(results: Results) -> list[Table]:
    """What each system costs to train, to keep and to run, and what each stage took."""
    systems = Table(title="What each system costs", caption="FLOPs: floating point operations")
    systems.add_column("system")
    for column in ("training FLOPs", "trained parameters", "stored parameters", "FLOPs per token at inference"):
        systems.add_column(column, justify="right")
    for system, cost in results.system_costs.items():
        figures = (cost.training_flops, cost.trained_parameters, cost.stored_parameters, cost.inference_flops)
        systems.add_row(system_name(system), *map(_short, figures))
    stages = Table(title="What each stage took")
    stages.add_column("stage")
    for column in ("seconds", "FLOPs", "tokens", "peak memory"):
        stages.add_column(column, justify="right")
    for stage, cost in results.stage_costs.items():
        memory = figure_with_prefix(cost.peak_memory, "B")
        stages.add_row(stage, f"{cost.seconds:.1f}", _short(cost.flops), _short(cost.tokens), memory)
    return [systems, stages]


def comparison_table(comparison: Comparison) -> Table:
    """Every system of a comparison with its scores and costs."""
    title = f"Comparison on {comparison.split} rows, mean over the tasks"
    table = Table(title=title, caption="differences: of the loss, with 95 % intervals over rows")
    head, *lines = comparison.rows()
    for column in head:
        table.add_column(column, justify="left" if column == "system" else "right")
    for line in lines:
        table.add_row(*line)
    return table


def _short(value: float | None) -> str:
    return "-" if value is None else figure_with_prefix(value)


def selection_table(selection: Selection, expected: Mapping[str, str] | None = None) -> Table:
    """Every auxiliary task with its score; `expected` adds a column that says what is known of it."""
    table = Table(title=f"What helps {', '.join(selection.targets)}", caption=selection.summary)
    table.add_column("task")
    table.add_column("score (lower is better)", justify="right")
    table.add_column("selected")
    if expected:
        table.add_column("what it is")
    for task, score in sorted(selection.scores.items(), key=lambda item: item[1]):
        taken = f"weight {selection.weights[task]:.2f}" if task in selection.weights else ""
        row = [task, f"{score:.4f}", "yes" if taken == "weight 1.00" else taken]
        table.add_row(*row, *([expected.get(task, "")] if expected else []))
    return table


def path_table(selection: Selection) -> Table:
    """The steps of a search, each with its interval and its close calls, and the baselines."""
    table = Table(title=f"How {selection.method.replace('_', ' ')} selection came there")
    table.add_column("step")
    table.add_column("predicted loss", justify="right")
    levels = [step["level"] for step in selection.path if step.get("level") is not None]
    table.add_column(f"{levels[0]:.0%} interval" if levels else "interval", justify="right")
    table.add_column("close calls")
    answered = [step["answered"] for step in selection.path if "answered" in step]
    if answered:
        table.add_column("answered", justify="right")
    for step in selection.path:
        change = f"without {step['removed']}" if "removed" in step else step["added"]
        interval = step.get("interval")
        table.add_row(
            change,
            f"{step['predicted_loss']:.4f}",
            "-" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}",
            _listed(step.get("close_calls", [])),
            *([f"{step['answered']:.3f}"] if answered else []),
        )
    table.add_section()
    for name, loss in selection.baselines.items():
        table.add_row(f"baseline: {name.replace('_', ' ')}", f"{loss:.4f}", "", "")
    return table


def _listed(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names) if len(names) <= most else f"{', '.join(names[:most])} and {len(names) - most} more"


def group_curve_table(grouping: Grouping) -> Table:
    """Tasks of each group, and the predicted loss by the number of groups."""
    table = Table(title="Groups", caption=grouping.summary)
    table.add_column("group")
    table.add_column("tasks")
    table.add_column("trained on")
    for name, tasks in grouping.groups.items():
        table.add_row(name, ", ".join(tasks), _trained_on(grouping, name))
    table.add_section()
    # A few of the points, the last one among them: a picture has all.
    for point in grouping.cost_curve[:: -max(1, len(grouping.cost_curve) // _MAX_POINTS)][::-1]:
        values = f"predicted loss {point['predicted_loss']:.4f}, expected {point['expected_loss']:.4f}"
        table.add_row(f"cost {point['cost']:.2f}", values, counted(int(point["num_groups"]), "mixture"))
    if not grouping.cost_curve:
        for count, loss in grouping.predicted_loss.items():
            table.add_row(counted(int(count), "group"), f"predicted loss {loss:.4f}", "")
    table.add_section()
    for name, loss in grouping.baselines.items():
        table.add_row(f"baseline: {name}", f"predicted loss {loss:.4f}", "")
    return table


def _trained_on(grouping: Grouping, name: str) -> str:
    """The mixture of a group, and for how long it is trained where that is not a whole training."""
    length = grouping.length_of(name)
    return _mixture(grouping, name) + ("" if length == 1 else f" ({length:g} of a training)")


def _mixture(grouping: Grouping, name: str) -> str:
    """What a group's adapter is trained on, with the weights of a row where they are not 1."""
    own = grouping.mixtures[name]
    if set(own) == set(grouping.task_names) and set(own.values()) == {1.0}:
        return "all tasks"
    heaviest = sorted(grouping.trained_on(name), key=lambda task: -own[task])
    return _listed([task if own[task] == 1 else f"{own[task]:.2f} {task}" for task in heaviest], most=8)


def example_table(scores: ExampleScores) -> Table:
    """Quartiles of the rows' scores by task."""
    table = Table(title=f"Training rows, for {', '.join(scores.targets)}", caption=scores.summary)
    without = scores.num_without_score()
    for column in ("task", "rows", "that harm", "lower quartile", "median", "upper quartile"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, own in scores.scores.items():
        values = list(own.values())
        quartiles = (f"{value:.2e}" for value in np.quantile(values, [0.25, 0.5, 0.75]))
        rows = f"{len(values)} of {scores.num_rows[task]}" if task in without else str(len(values))
        table.add_row(task, rows, str(sum(value < 0 for value in values)), *quartiles)
    return table


def fidelity_table(report: FidelityReport) -> Table:
    """Every subset with its mean predicted and true loss."""
    table = Table(
        title="Prediction against truth: mean validation loss of subsets fine-tuned for real",
        caption=f"over all tasks: mean relative error {report.mean_relative_error:.1%}, "
        f"correlation {_figure(report.correlation, '.3f')}, "
        f"mean per-task Spearman {_figure(report.mean_task_spearman)}",
    )
    table.add_column("trained on")
    table.add_column("predicted", justify="right")
    table.add_column("true", justify="right")
    for subset, predicted, true in zip(report.subsets, report.predicted_loss, report.true_loss):
        table.add_row(", ".join(subset), f"{sum(predicted) / len(predicted):.4f}", f"{sum(true) / len(true):.4f}")
    return table


def fidelity_summary(report: FidelityReport) -> Table:
    """Every measure of a fidelity report."""
    table = Table(title="How far predictions are to be trusted")
    table.add_column("measure")
    table.add_column("value", justify="right")
    rows = [
        ("mean relative error of the loss", f"{report.mean_relative_error:.1%}"),
        ("mean error of the accuracy", _figure(report.mean_accuracy_error, ".3f")),
        ("mean per-task Spearman", _figure(report.mean_task_spearman)),
        ("    over subsets that hold the task", _figure(report.mean_task_spearman_inside)),
        ("    over subsets that do not", _figure(report.mean_task_spearman_outside)),
        ("correlation of losses", _figure(report.correlation, ".3f")),
        ("correlation of their changes by training", _figure(report.change_correlation, ".3f")),
    ]
    if report.interval_level is not None:
        rows.append((f"true losses inside of {report.interval_level:.0%} intervals", f"{report.interval_coverage:.0%}"))
    if report.ceiling is not None:
        ceiling = report.ceiling
        rows += [
            (
                f"another seed of the truth ({ceiling.num_subsets} subsets): relative error",
                f"{ceiling.mean_relative_error:.1%}",
            ),
            (
                "    its Spearman, and the predictions' on these subsets",
                f"{_figure(ceiling.mean_task_spearman)}, {_figure(ceiling.predicted_mean_task_spearman)}",
            ),
        ]
    if report.first_order is not None:
        rows.append(("first-order error of the margins (squared)", f"{report.first_order.squared_error:.2%}"))
    if report.speed_up is not None:
        rows.append(("100 trainings, in time of capture and 100 predictions", f"{report.speed_up:.0f}"))
    rows.append(("penalty", f"c = {report.l2_scale:.3g}, from {report.l2_evidence}"))
    for row in rows:
        table.add_row(*row)
    return table


def _figure(value: float | None, form: str = ".2f") -> str:
    """A measure, or that there are too few subsets for one."""
    return "-" if value is None or np.isnan(value) else format(value, form)


def console(**options: Any) -> Console:
    """Where commands print: texts as they are, whatever brackets and colons they hold."""
    return Console(**{"markup": False, "emoji": False, "highlight": False, **options})
