"""Pictures of choices: a selection's path, a mixture's shares, loss against the number of groups, scores of rows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .._settings import check_one_of
from ..errors import ConfigurationError
from ..select import ExampleScores, Grouping, Mixture, Selection
from .drawing import BLUE, GREY, ORANGE, drawing, shortened
from .mixture_pictures import cost_curve, mixture_weights
from .pictures import affinity_heat_map

SUFFIXES = ("png", "svg", "pdf", "jpg", "webp")
_BASELINES = {
    "all": "all tasks",
    "alone": "targets alone",
    "random": "as many at random",
    "gradient_similarity": "as many by gradient similarity",
}


def draw_choice(
    choice: Selection | Mixture | Grouping | ExampleScores, folder: str | Path, suffixes: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Draw what there is to see of a choice.

    Args:
        choice (`Selection`, `Mixture`, `Grouping` or `ExampleScores`): what to draw.
        folder (`str` or `Path`): where the pictures go.
        suffixes (`Sequence[str]`, *optional*, defaults to `("png", "svg")`): formats.

    Returns:
        `list[Path]`: the pictures.

    Raises:
        `ConfigurationError`: for anything but a choice, and unknown formats.
    """
    if not isinstance(choice, (Selection, Mixture, Grouping, ExampleScores)):
        raise ConfigurationError(
            f"Expected a Selection, Mixture, Grouping or ExampleScores, found {choice!r:.60}. Load a saved one first."
        )
    for suffix in suffixes:
        check_one_of("Each suffix of a picture", suffix, SUFFIXES)
    pictures = {}
    if isinstance(choice, Selection):
        pictures["selection_path"] = lambda path: selection_path(choice, path)
        if len(set(choice.weights.values())) > 1:
            pictures["weights"] = lambda path: weight_bars(choice.weights, path, list(choice.targets))
    elif isinstance(choice, Mixture):
        pictures["weights"] = lambda path: weight_bars(choice.weights, path, list(choice.targets))
    elif isinstance(choice, Grouping):
        pictures["affinity"] = lambda path: affinity_heat_map(choice, path)
        if choice.method == "mixtures":
            pictures["cost_curve"] = lambda path: cost_curve(choice, path)
            pictures["mixtures"] = lambda path: mixture_weights(choice, path)
        elif len(choice.predicted_loss) > 1:
            pictures["groups"] = lambda path: group_curve(choice, path)
    else:
        pictures["example_scores"] = lambda path: example_scores(choice, path)
    drawn = []
    for name, draw in pictures.items():
        for suffix in suffixes:
            drawn.append(Path(folder) / f"{name}.{suffix}")
            draw(drawn[-1])
    return drawn


def selection_path(selection: Selection, path: Path) -> None:
    """Predicted loss after each step with its interval, and the baselines' losses as lines."""
    steps = selection.path
    loss = np.array([step["predicted_loss"] for step in steps])
    rows = np.arange(len(steps))
    with drawing(path, (6.0, 1.6 + 0.3 * len(steps) + 0.2 * len(selection.baselines))) as axes:
        known = [(row, step) for row, step in zip(rows, steps) if step.get("interval") is not None]
        for index, (row, step) in enumerate(known):
            label = f"{step['level']:.0%} interval" if index == 0 else None
            axes.hlines(row, *step["interval"], color="0.8", linewidth=5, zorder=1, label=label)
        axes.plot(loss, rows, color=BLUE, marker="o", markersize=4, linewidth=1.2, zorder=3)
        styles = ["-", "--", ":", "-."]
        for (name, value), line in zip(selection.baselines.items(), styles):
            axes.axvline(value, color=ORANGE, linestyle=line, linewidth=1, zorder=2, label=_BASELINES.get(name, name))
        axes.set_yticks(rows, [_step_label(step, first=row == 0) for row, step in enumerate(steps)])
        axes.invert_yaxis()
        axes.set_xlabel("predicted validation loss (nats per token)")
        axes.set_title(
            f"{selection.method.replace('_', ' ')} selection for {shortened(', '.join(selection.targets), 40)}"
        )
        if selection.baselines or known:
            axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, title="predicted for")


def weight_bars(weights: dict[str, float], path: Path, targets: Sequence[str] = ()) -> None:
    """How often a row of each task is drawn: targets, then the others, the most drawn first."""
    names = sorted(weights, key=lambda name: (name not in targets, -weights[name]))
    with drawing(path, (5.6, 1.0 + 0.26 * len(names))) as axes:
        colors = [ORANGE if name in targets else BLUE for name in names]
        bars = axes.barh(range(len(names)), [weights[name] for name in names], color=colors, height=0.7)
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.set_yticks(range(len(names)), [f"{name} (target)" if name in targets else name for name in names])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.12 * max(weights.values()))
        axes.set_xlabel("how often a row is drawn")
        axes.set_title("Mixture")


def group_curve(grouping: Grouping, path: Path) -> None:
    """Mean predicted loss against the number of groups; the number taken is marked."""
    counts = sorted(map(int, grouping.predicted_loss))
    losses = [grouping.predicted_loss[str(count)] for count in counts]
    taken = len(grouping.groups)
    with drawing(path, (5.2, 3.2)) as axes:
        axes.plot(counts, losses, color=BLUE, marker="o", markersize=4, linewidth=1.2)
        if str(taken) in grouping.predicted_loss:
            axes.scatter(
                [taken], [grouping.predicted_loss[str(taken)]], s=90, facecolors="none", edgecolors=ORANGE, zorder=3
            )
            axes.annotate(
                f"{taken} taken",
                (taken, grouping.predicted_loss[str(taken)]),
                (9, -3),
                textcoords="offset points",
                color=ORANGE,
                ha="left",
                va="top",
            )
        axes.margins(y=0.12)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("groups")
        axes.set_ylabel("mean predicted loss (nats per token)")
        axes.set_title(f"Loss against number of groups ({grouping.method})")


def example_scores(scores: ExampleScores, path: Path, most: int = 30) -> None:
    """Spread of the rows' scores by task: median, quartiles and single rows; those that harm are orange."""
    names = sorted(scores.scores, key=lambda name: np.median(list(scores.scores[name].values())), reverse=True)[:most]
    generator = np.random.default_rng(0)
    with drawing(path, (6.0, 1.4 + 0.3 * len(names))) as axes:
        for row, name in enumerate(names):
            values = np.array(list(scores.scores[name].values()))
            heights = row + generator.uniform(-0.3, 0.3, len(values))
            for held, color in ((values >= 0, BLUE), (values < 0, ORANGE)):
                axes.scatter(values[held], heights[held], s=4, color=color, linewidths=0, alpha=0.6, rasterized=True)
            low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
            axes.hlines(row, low, high, color="black", linewidth=2)
            axes.plot(middle, row, marker="|", color="black", markersize=10)
        axes.axvline(0, color=GREY, linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
        axes.set_xlabel("how much drawing a row once more lowers the predicted loss (nats)")
        axes.set_title(f"Scores of training rows for {shortened(', '.join(scores.targets), 40)}")


def _step_label(step: dict, first: bool) -> str:
    if "removed" in step:
        return f"− {step['removed']}"
    return f"{'' if first else '+ '}{shortened(step['added'], 34)}"
