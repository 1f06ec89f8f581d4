"""Pictures of a run."""

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from .._files import write_atomically


def affinity_heat_map(grouping: dict[str, Any], path: Path) -> None:
    """Heat map of the affinity, tasks ordered by group, as a PNG.

    Args:
        grouping (`dict`): as in `groups.json`.
        path (`Path`): where to write.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    names = grouping["task_names"]
    ordered = [task for tasks in grouping["groups"].values() for task in tasks]
    positions = [names.index(task) for task in ordered]
    affinity = np.array(grouping["affinity"])[np.ix_(positions, positions)]
    # How a task does beside itself was never asked.
    np.fill_diagonal(affinity, np.nan)
    limit = float(np.nanmax(np.abs(affinity))) or 1.0
    style = resources.files("hf_ensemble.model_cards") / "pictures.mplstyle"
    with resources.as_file(style) as style_file, plt.style.context(str(style_file)):
        side = 2.4 + 0.34 * len(ordered)
        figure, axes = plt.subplots(figsize=(side + 1.0, side), layout="constrained")
        # Blue to red by way of white: told apart by the colour-blind, and centred where a pair makes no difference.
        image = axes.imshow(affinity, cmap="RdBu", vmin=-limit, vmax=limit)
        axes.set_xticks(range(len(ordered)), ordered, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(ordered)), ordered)
        start = 0
        for tasks in grouping["groups"].values():
            size = len(tasks)
            corner = (start - 0.5, start - 0.5)
            axes.add_patch(plt.Rectangle(corner, size, size, fill=False, edgecolor="black", linewidth=1.6))
            start += size
        axes.set_xlabel("trained beside")
        axes.set_ylabel("task")
        axes.set_title("Predicted affinity, boxes are groups")
        figure.colorbar(image, ax=axes, shrink=0.8, label="loss below usual (spreads)")
        write_atomically(path, lambda file: figure.savefig(file, format="png"))
        plt.close(figure)
