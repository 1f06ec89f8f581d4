"""Pictures of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..select import Grouping
from .drawing import BLUE, ORANGE, drawing, shortened

_MOST_NAMED = 20


def affinity_heat_map(grouping: Grouping, path: Path) -> None:
    """Heat map of the affinity, tasks ordered by group, as PNG or SVG.

    Args:
        grouping ([`Grouping`]): what to draw.
        path (`Path`): where to write.
    """
    from matplotlib.patches import Rectangle

    names = grouping.task_names
    ordered = [task for tasks in grouping.groups.values() for task in tasks]
    positions = [names.index(task) for task in ordered]
    affinity = np.array(grouping.affinity)[np.ix_(positions, positions)]
    # How a task does beside itself was never asked.
    np.fill_diagonal(affinity, np.nan)
    limit = float(np.nanmax(np.abs(affinity))) or 1.0
    side = 2.4 + 0.34 * len(ordered)
    with drawing(path, (side + 1.0, side)) as axes:
        # Blue to red by way of white: told apart by the colour-blind, and centred where a pair makes no difference.
        image = axes.imshow(affinity, cmap="RdBu", vmin=-limit, vmax=limit)
        axes.set_xticks(range(len(ordered)), ordered, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(ordered)), ordered)
        start = 0
        for tasks in filter(None, grouping.groups.values()):
            size = len(tasks)
            corner = (start - 0.5, start - 0.5)
            axes.add_patch(Rectangle(corner, size, size, fill=False, edgecolor="black", linewidth=1.6))
            start += size
        axes.set_xlabel("trained beside")
        axes.set_ylabel("task")
        axes.set_title("Predicted affinity, boxes are groups")
        axes.figure.colorbar(image, ax=axes, shrink=0.8, label="loss below usual (nats)")


def fidelity_picture(report: Any, path: Path) -> None:
    """Predicted against true losses with the predictions' intervals, filled where the subset holds the task.

    Args:
        report ([`FidelityReport`]): what was measured.
        path (`Path`): where to write.
    """
    predicted, true, low, high = (
        np.array(values) for values in (report.predicted_loss, report.true_loss, report.loss_low, report.loss_high)
    )
    inside = np.array([[name in subset for name in report.task_names] for subset in report.subsets])
    with drawing(path, (5.6, 5.2)) as axes:
        ends = [min(true.min(), predicted.min()), max(true.max(), predicted.max())]
        axes.plot(ends, ends, color="0.6", linewidth=1, zorder=1)
        axes.vlines(true, low, high, color="0.8", linewidth=0.6, zorder=0)
        for held, label in ((True, "trained on"), (False, "not trained on")):
            style = {"facecolors": BLUE if held else "none", "edgecolors": BLUE if held else ORANGE}
            axes.scatter(true[inside == held], predicted[inside == held], s=14, linewidths=0.8, label=label, **style)
        axes.set_xlabel("true validation loss (nats per token)")
        axes.set_ylabel("predicted")
        axes.set_title(f"{len(true)} subsets of {true.shape[1]} tasks: prediction against truth")
        axes.legend(title="task was", loc="upper left")


def prediction_picture(losses: Mapping[str, tuple[float, float]], path: Path) -> None:
    """Predicted against measured loss of each task, the tasks named where there are few; on the line they are equal.

    Args:
        losses (`dict[str, tuple[float, float]]`): predicted and measured loss, by task.
        path (`Path`): where to write.
    """
    predicted, measured = np.array(list(losses.values())).T
    with drawing(path, (5.6, 5.2)) as axes:
        ends = [min(predicted.min(), measured.min()), max(predicted.max(), measured.max())]
        axes.plot(ends, ends, color="0.6", linewidth=1, zorder=1)
        axes.scatter(measured, predicted, s=18, color=BLUE, zorder=2)
        if len(losses) <= _MOST_NAMED:
            for name, x, y in zip(losses, measured, predicted):
                # No formula: a name may hold dollar signs.
                axes.annotate(shortened(name), (x, y), (4, 3), textcoords="offset points", fontsize=7, parse_math=False)
        axes.margins(x=0.15)
        axes.set_xlabel("measured loss (nats per token)")
        axes.set_ylabel("predicted")
        axes.set_title("Prediction against truth, by task")
