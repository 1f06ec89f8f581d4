"""An ensemble beside the simpler systems that it has to beat."""

from dataclasses import dataclass, field

from .._cards import text
from .._records import Record
from ..evaluate import SystemIntervals, TaskScores, mean_scores, system_intervals
from .costs import SystemCost, figure_with_prefix
from .evaluation import RowFigures
from .systems import BASELINE, system_name


@dataclass(frozen=True)
class ComparedSystem:
    """One system of a comparison.

    Args:
        scores (`dict[str, TaskScores]`): by task.
        rows (`dict[str, RowFigures]`): of single rows, by task.
        cost (`SystemCost`): to train, to keep and to run.
        search_flops (`float`): floating point operations by which its weights were searched for.
        note (`str`): what was chosen for it, in words.
        settings (`dict[str, float]`): of the comparison, those that it depends on.
    """

    scores: dict[str, TaskScores]
    rows: dict[str, RowFigures]
    cost: SystemCost
    search_flops: float = 0.0
    note: str = ""
    settings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison(Record):
    """Systems that were trained, scored and costed by the same code on the same rows.

    Args:
        split (`str`): `"test"` for held-out rows, else `"eval"`.
        systems (`dict[str, ComparedSystem]`): by name, in the order of [`BASELINES`].
        left_out (`dict[str, str]`): systems that this model or these tasks do not allow, and why.
    """

    format = "hf_ensemble.comparison"
    format_version = 2

    split: str
    systems: dict[str, ComparedSystem] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def intervals(self) -> dict[str, SystemIntervals]:
        """95 % intervals over rows of every figure, and of its paired difference from one adapter for all."""
        rows = {name: {task: one.as_scores() for task, one in own.rows.items()} for name, own in self.systems.items()}
        # One that has just begun has not scored it yet.
        return system_intervals(rows, BASELINE if BASELINE in rows else None)

    def mean(self, system: str) -> TaskScores:
        """A system's scores, mean over the tasks."""
        return mean_scores(self.systems[system].scores)

    def rows(self) -> list[list[str]]:
        """The table as text: its head, and a line for each system."""
        metrics = dict.fromkeys(name for system in self.systems for name in self.mean(system).metrics)
        head = ["system", "loss", "difference", "accuracy", *metrics]
        head += ["training FLOPs", "x one for all", "stored parameters", "FLOPs per token"]
        intervals = self.intervals()
        whole = self.systems[BASELINE].cost.training_flops if BASELINE in self.systems else 0.0
        lines = [head]
        for system, own in self.systems.items():
            mean, cost = self.mean(system), own.cost
            figures = [f"{value:.3f}" if (value := mean.figures().get(n)) is not None else "-" for n in head[3:-4]]
            share = f"{cost.training_flops / whole:.2f}" if whole else "-"
            run = "-" if cost.inference_flops is None else figure_with_prefix(cost.inference_flops)
            costs = [figure_with_prefix(cost.training_flops), share, figure_with_prefix(cost.stored_parameters), run]
            name, difference = system_name(system), _difference(intervals.get(system))
            lines.append([name, f"{mean.loss:.4f}", difference, *figures, *costs])
        return lines

    def to_markdown(self) -> str:
        """The table in Markdown, with what was left out.

        Names and notes are escaped: what means something in Markdown or HTML is a reference to its character.
        """
        rows = "held-out test" if self.split == "test" else "evaluation"
        head, *lines = self.rows()
        said = [f"On the {rows} rows, mean over the tasks. Differences of the loss are from one adapter for all,"]
        said += ["with 95 % intervals over rows; FLOPs are floating point operations."]
        said += ["", _markdown_row(head), f"|{'---|' * len(head)}", *map(_markdown_row, lines)]
        notes = [f"{system_name(name)}: {own.note}." for name, own in self.systems.items() if own.note]
        notes += [f"Left out: {system_name(name)}. {why}" for name, why in self.left_out.items()]
        said += [line for note in notes for line in ("", text(note))]
        return "\n".join(said) + "\n"


def _difference(intervals: SystemIntervals | None) -> str:
    own = None if intervals is None else intervals.mean_difference.get("loss")
    if own is None:
        return ""
    low, high = own.interval
    return f"{own.value:+.4f} ({low:+.4f} to {high:+.4f})"


def _markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(map(text, cells))} |"
