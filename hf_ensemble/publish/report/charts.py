"""Pictures of a run that its records alone hold."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...runs import Results, TrainedAdapter
from ...runs.systems import BASELINE, main_system, ordered_systems, system_name
from ...select import LeftOut
from ..drawing import BLUE, GREY, ORANGE, drawing, shortened

# Inches: legible on a phone's screen, and two beside each other on a large one.
_WIDTH = 4.8
# Panels of the training curves.
_MOST_PANELS = 24
_MARKERS = {
    "base": ("o", GREY),
    BASELINE: ("s", ORANGE),
    "ensemble": ("D", BLUE),
    "selection": ("D", BLUE),
}
# Of further systems, in turn.
_OTHER_MARKERS = "^v<>PX*ph"


def difference_chart(results: Results, system: str, path: Path) -> None:
    """By task, how much lower the loss of a system is than the reference's, with its interval."""
    own = results.intervals[system].differences
    tasks = [task for task in results.scores[system] if "loss" in own.get(task, {})]
    tasks.sort(key=lambda task: own[task]["loss"].value)
    from matplotlib.ticker import MaxNLocator

    with drawing(path, (_WIDTH, 1.0 + 0.24 * len(tasks))) as axes:
        for row, task in enumerate(tasks):
            one = own[task]["loss"]
            color = BLUE if one.value < 0 else ORANGE
            axes.hlines(row, *one.interval, color=color if one.is_clear else "0.6", linewidth=2.5, zorder=2)
            axes.plot(one.value, row, "o", color=color, markersize=5, zorder=3)
        axes.axvline(0, color="black", linewidth=0.8, zorder=1)
        axes.set_yticks(range(len(tasks)), [shortened(task) for task in tasks])
        axes.invert_yaxis()
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(f"loss minus that of {_of(results.reference)} (nats)")


def loss_chart(results: Results, path: Path) -> None:
    """By task, the loss of every system with its interval."""
    systems = ordered_systems(results.scores)
    tasks = list(results.scores[main_system(results.scores)])
    offsets = np.linspace(-0.22, 0.22, len(systems)) if len(systems) > 1 else [0.0]
    with drawing(path, (_WIDTH, 1.3 + max(0.34, 0.1 * len(systems)) * len(tasks))) as axes:
        further = [system for system in systems if system not in _MARKERS]
        for system, offset in zip(systems, offsets):
            other = (_OTHER_MARKERS[further.index(system) % len(_OTHER_MARKERS)], GREY) if system in further else None
            marker, color = _MARKERS.get(system) or other
            scores, known = results.scores[system], results.intervals.get(system)
            rows = [(row, task) for row, task in enumerate(tasks) if task in scores]
            for row, task in rows:
                interval = known.tasks.get(task, {}).get("loss") if known else None
                if interval is not None:
                    axes.hlines(row + offset, *interval, color=color, linewidth=1.5, alpha=0.6)
            places = [row + offset for row, _ in rows]
            losses = [scores[task].loss for _, task in rows]
            axes.plot(losses, places, marker, color=color, markersize=4, linestyle="none", label=system_name(system))
        axes.set_yticks(range(len(tasks)), [shortened(task) for task in tasks])
        axes.invert_yaxis()
        axes.set_xlabel("loss (nats per token, lower is better)")
        axes.figure.legend(loc="outside upper left", ncols=min(len(systems), 3), frameon=False, handletextpad=0.2)


def left_out_chart(left_out: Mapping[str, LeftOut], path: Path) -> None:
    """Predicted change of the others' mean loss by leaving out each task, with 90 % intervals."""
    tasks = sorted(left_out, key=lambda task: left_out[task].mean_change)
    from matplotlib.ticker import MaxNLocator

    with drawing(path, (_WIDTH, 1.0 + 0.24 * len(tasks))) as axes:
        for row, task in enumerate(tasks):
            own = left_out[task]
            color = ORANGE if own.is_harmful else BLUE
            reach = 1.645 * own.standard_error
            axes.hlines(row, own.mean_change - reach, own.mean_change + reach, color="0.6", linewidth=2.5, zorder=2)
            axes.plot(own.mean_change, row, "o", color=color, markersize=5, zorder=3)
        axes.axvline(0, color="black", linewidth=0.8, zorder=1)
        axes.set_yticks(range(len(tasks)), [shortened(task) for task in tasks])
        axes.invert_yaxis()
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("change of the others' mean loss without it (nats)")


def curves_of(trainings: Sequence[TrainedAdapter], tasks: Sequence[str]) -> dict[str, dict[str, list]]:
    """Logged losses of each task: by task, and by `(training, kind)` the steps and losses, `(2, n)`.

    A task that no training logged by itself is absent.
    """
    found: dict[str, dict] = {}
    for task in tasks:
        for training in trainings:
            for kind, key in (("training", f"loss_{task}"), ("evaluation", f"eval_{task}_loss")):
                points = [
                    (entry["step"], entry[key])
                    for entry in training.log_history
                    if isinstance(entry.get(key), int | float) and "step" in entry
                ]
                if len(points) > 1:
                    found.setdefault(task, {})[training.name, kind] = list(zip(*points))
    return found


def curves_chart(curves: Mapping[str, Mapping[tuple[str, str], list]], path: Path) -> None:
    """A panel for each task: logged losses of the adapter for all in orange, of other adapters in blue."""
    tasks = list(curves)[:_MOST_PANELS]
    rows = -(-len(tasks) // 2)
    with drawing(path, (_WIDTH, 0.5 + 1.25 * rows)) as axes:
        figure = axes.figure
        axes.remove()
        panels = figure.subplots(rows, 2, squeeze=False).ravel()
        for panel, task in zip(panels, tasks):
            for (training, kind), (steps, losses) in curves[task].items():
                style = {"linestyle": "-", "linewidth": 1.0} if kind == "training" else {"marker": ".", "markersize": 4}
                color = ORANGE if training == BASELINE else BLUE
                panel.plot(steps, losses, color=color, **{"linestyle": "--", "linewidth": 1.0, **style})
            panel.set_title(shortened(task, 22), fontsize=8)
            panel.tick_params(labelsize=7)
        for panel in panels[len(tasks) :]:
            panel.remove()
        figure.supxlabel("optimizer steps", fontsize=8)
        figure.supylabel("loss (nats per token)", fontsize=8)


def training_chart(trainings: Sequence[TrainedAdapter], path: Path) -> None:
    """The logged loss of each training, for runs whose logs have none by task."""
    with drawing(path, (_WIDTH, 3.0)) as axes:
        for training in trainings:
            points = [(e["step"], e["loss"]) for e in training.log_history if "loss" in e and "step" in e]
            if len(points) > 1:
                color = ORANGE if training.name == BASELINE else BLUE
                axes.plot(*zip(*points), color=color, linewidth=1.0)
                axes.annotate(shortened(training.name, 16), points[-1], (3, 0), textcoords="offset points", fontsize=7)
        axes.margins(x=0.12)
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel("training loss (nats per token)")


def _of(reference: str | None) -> str:
    return {"base": "the base model", BASELINE: "one adapter for all"}.get(reference or "", str(reference))
