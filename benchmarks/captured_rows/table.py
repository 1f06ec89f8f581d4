"""Markdown table and picture of predictions by the number of captured rows."""

from pathlib import Path

import numpy as np

from hf_ensemble.publish.drawing import BLUE, GREY, ORANGE, drawing

from ..common import markdown_table

_MEASURES = {
    "error": ("mean relative error", ".2%"),
    "error_inside": ("of tasks trained on", ".2%"),
    "spearman": ("per-task Spearman", ".4f"),
    "spearman_inside": ("inside", ".4f"),
    "coverage": ("within the 90 % intervals", ".2f"),
}


def means(results: dict) -> dict[tuple[int | None, int | None], dict[str, float]]:
    """Mean over the samples of each measure, by numbers of captured training and validation rows."""
    found: dict[tuple[int | None, int | None], dict[str, float]] = {}
    for train, validation in dict.fromkeys((line["train"], line["validation"]) for line in results["lines"]):
        lines = [own for own in results["lines"] if (own["train"], own["validation"]) == (train, validation)]
        found[train, validation] = {name: float(np.mean([own[name] for own in lines])) for name in _MEASURES}
    return found


def table(results: dict) -> str:
    rows = []
    for (train, validation), own in means(results).items():
        count = results["rows"] if train is None else train
        cost = (count + (validation or results["validation_rows"])) * results["capture_cost"] / results["rows"]
        of_train = count * results["capture_cost"] / results["rows"]
        figures = [format(own[name], form) for name, (_, form) in _MEASURES.items()]
        rows.append((train or "all", validation or "all", *figures, f"{of_train:.1%}", f"{cost:.1%}"))
    header = ("training rows", "validation rows", *(title for title, _ in _MEASURES.values()))
    lines = [
        f"{results['tasks']} tasks of {results['rows']:,} training and {results['validation_rows']:,} validation rows; "
        f"{results['mixtures']} subsets of 1 to 25 tasks, whose mean loss is {results['mean_loss']['trained']:.3f} "
        f"({results['mean_loss']['base']:.3f} before). The loss of a task that is trained on falls to "
        f"{np.exp(-results['mean_move']):.0%}, in the geometric mean. Means over {results['seeds']} samples of each "
        "size. The cost is that of the capture in epochs of training on all tasks, where capturing a row costs "
        f"{results['capture_cost']:g} times as much as training on it (`benchmarks/capture`): of training rows, and of "
        "both.",
        "",
        *markdown_table((*header, "cost", "cost of both"), rows),
    ]
    return "\n".join(lines) + "\n"


def draw(results: dict, path: str) -> None:
    """Error by the number of captured rows."""
    found = means(results)
    counts = sorted({train for train, _ in found if train})
    with drawing(Path(path), (5.2, 3.4)) as axes:
        for color, label, both in ((BLUE, "training rows", False), (ORANGE, "training and validation rows", True)):
            own = {
                train: values
                for (train, validation), values in found.items()
                if train and (validation == train) == both
            }
            if not own:
                continue
            errors = [100 * values["error"] for values in own.values()]
            axes.plot(list(own), errors, color=color, marker="o", markersize=4, linewidth=1.2, label=label)
        axes.axhline(100 * found[None, None]["error"], color=GREY, linewidth=1.0, linestyle="--", label="all rows")
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.set_xlabel("captured rows of a task")
        axes.set_ylabel("mean relative error of the loss, %")
        axes.margins(y=0.1)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
