"""Accuracy against training cost, one point a system."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Kinds of systems, by how their labels begin, with their colors.
KINDS = {
    "one adapter for all": ("one adapter, longer", "#444444"),
    "one for all, then what is chosen": ("one for all, then what is chosen", "#c8553d"),
    "one for all, then mixtures": ("one for all, then mixtures (earlier search)", "#d99a8c"),
    "one for all, then each task": ("one for all, then each task", "#2a7f9e"),
    "one for all and mixtures": ("one for all and mixtures", "#e0a030"),
    "mixtures": ("mixtures", "#8a6fb0"),
}
OTHERS = ("other baselines", "#9aa5ad")


def draw(results: dict, file: Path) -> None:
    """Write the picture: a panel for each recipe."""
    recipes = results["recipes"]
    figure, axes = plt.subplots(1, len(recipes), figsize=(6.4 * len(recipes), 4.8), squeeze=False)
    for axis, (name, own) in zip(axes[0], recipes.items()):
        lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for system in own["systems"]:
            kind = next((value for prefix, value in KINDS.items() if system["system"].startswith(prefix)), OTHERS)
            if " wide" in system["system"]:
                kind = (f"{kind[0]}, twice the rank", kind[1])
            lines.setdefault(kind, []).append((system["cost"], 100 * system["weights"]["test_accuracy"]))
        for (label, color), points in lines.items():
            costs, values = zip(*sorted(points))
            style = "o" if (label, color) == OTHERS else "s" if label.endswith("rank") else "o-"
            axis.plot(costs, values, style, color=color, label=label, markersize=5, linewidth=1.4)
        axis.set_title(name)
        axis.set_xlabel("training cost, one adapter for all = 1")
        axis.set_ylabel("mean test accuracy, %")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][-1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)
