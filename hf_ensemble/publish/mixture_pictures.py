"""Pictures of groups that are mixtures: what they are worth for what they cost, and what they are made of."""

from pathlib import Path

import numpy as np

from ..select import Grouping
from .drawing import BLUE, GREY, ORANGE, drawing


def cost_curve(grouping: Grouping, path: Path) -> None:
    """Predicted and expected loss against training cost, with the interval of the difference from one adapter for all.

    Args:
        grouping ([`Grouping`]): with a `cost_curve`.
        path (`Path`): where to write.
    """
    points = grouping.cost_curve
    cost, predicted, expected, difference, low, high = (
        np.array([point[name] for point in points])
        for name in ("cost", "predicted_loss", "expected_loss", "difference", "difference_low", "difference_high")
    )
    together = float((predicted - difference)[0] + points[0]["optimism"])
    with drawing(path, (5.6, 3.8)) as axes:
        axes.axhline(together, color=GREY, linewidth=1, zorder=0, label="one adapter for all")
        axes.vlines(cost, together + low, together + high, color="0.85", linewidth=4, zorder=1, label="90 % interval")
        axes.plot(cost, predicted, color=GREY, linestyle="--", linewidth=1, zorder=2, label="predicted")
        axes.plot(cost, expected, color=BLUE, marker="o", markersize=3, linewidth=1.2, zorder=3, label="expected")
        taken = taken_point(grouping)
        axes.scatter([cost[taken]], [expected[taken]], s=90, facecolors="none", edgecolors=ORANGE, zorder=4)
        axes.annotate("taken", (cost[taken], expected[taken]), (9, 6), textcoords="offset points", color=ORANGE)
        axes.set_xlabel("training cost (one adapter for all = 1)")
        axes.set_ylabel("mean validation loss (nats per token)")
        axes.set_title("Loss against training cost (mixtures)")
        axes.figure.legend(loc="outside lower center", ncols=4, frameon=False)


def taken_point(grouping: Grouping) -> int:
    """Number of the point of the curve that the groups are; others may cost as much."""

    def distance(number: int) -> tuple[float, float]:
        point = grouping.cost_curve[number]
        loss = 0.0 if grouping.expected_loss is None else abs(point["expected_loss"] - grouping.expected_loss)
        return round(abs(point["cost"] - grouping.cost), 9), loss

    return min(range(len(grouping.cost_curve)), key=distance)


def mixture_weights(grouping: Grouping, path: Path) -> None:
    """What each adapter is trained on; frames mark the tasks that it serves.

    Args:
        grouping ([`Grouping`]): what to draw.
        path (`Path`): where to write.
    """
    from matplotlib.patches import Rectangle

    names, groups = grouping.task_names, list(grouping.groups)
    weights = np.array([[grouping.mixtures[group].get(name, 0.0) for name in names] for group in groups])
    with drawing(path, (2.6 + 0.34 * len(names), 1.9 + 0.32 * len(groups))) as axes:
        image = axes.imshow(weights, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
        for row, group in enumerate(groups):
            for task in grouping.groups[group]:
                corner = (names.index(task) - 0.5, row - 0.5)
                axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=ORANGE, linewidth=1.6))
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(groups)), groups)
        axes.set_title("Mixtures, frames are the tasks served")
        axes.figure.colorbar(image, ax=axes, label="how often a row is drawn")
