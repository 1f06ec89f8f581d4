"""What a run showed, in one sentence or two."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from ..evaluate import Difference, SystemIntervals, TaskScores
from .systems import BASELINE

# Names that a sentence lists before it counts.
_MOST_NAMES = 4
# Share of an ensemble's gain, from which on it is said that a scale of one adapter's logits has it too.
_WORTH_SAYING = 0.1


class SelectedTasks(Protocol):
    """What the verdict reads of a selection."""

    targets: list[str]
    auxiliary: list[str]
    predicted_loss: float | None
    baselines: dict[str, float]


def verdict(
    scores: Mapping[str, Mapping[str, TaskScores]],
    mean_loss: Mapping[str, float],
    intervals: Mapping[str, SystemIntervals],
    reference: str | None = None,
    weights: Mapping[str, Mapping[str, float]] | None = None,
    equals_baseline: bool = False,
    continues_baseline: bool = False,
    scaled_loss: Mapping[str, float] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    harmful: Mapping[str, int] | None = None,
    selection: SelectedTasks | None = None,
) -> str:
    """What to make of a run: the fields of [`Results`] in words.

    It goes by losses. A difference is clear where its 95 % interval over the rows lies on one side of zero; without
    scores of single rows every one is.
    """
    if "selection" in scores and selection is not None:
        said = _of_selection(scores["selection"], scores.get("base", {}), selection)
    elif "ensemble" in scores:
        is_one = (equals_baseline, continues_baseline)
        said = _of_ensemble(
            scores, mean_loss, intervals, reference, weights or {}, *is_one, len(groups or {}), scaled_loss or {}
        )
    else:
        said = "Nothing was trained that could be judged."
    hint = _harmful(harmful or {}, len(next(iter(scores.values()), {})))
    return f"{said} {hint}" if hint else said


def _of_ensemble(
    scores: Mapping[str, Mapping[str, TaskScores]],
    mean_loss: Mapping[str, float],
    intervals: Mapping[str, SystemIntervals],
    reference: str | None,
    weights: Mapping[str, Mapping[str, float]],
    equals_baseline: bool,
    continues_baseline: bool,
    num_groups: int,
    scaled_loss: Mapping[str, float],
) -> str:
    tasks = list(scores["ensemble"])
    own = mean_loss["ensemble"]
    base = _mean_difference("ensemble", "base", scores, mean_loss, intervals, reference)
    one_for_all_helps = BASELINE in mean_loss and mean_loss[BASELINE] < mean_loss.get("base", 0.0)
    if base is not None and base.value > 0 and base.is_clear and not one_for_all_helps:
        return (
            f"Fine-tuning did not help: the base model's mean loss is {number(mean_loss['base'])}, that of the "
            f"ensemble {number(own)}. Lower the learning rate, or train for fewer steps."
        )
    if equals_baseline and num_groups == 1:
        return (
            f"One adapter is enough for these {len(tasks)} datasets: the grouping put all of them into one group, so "
            "the ensemble is the one adapter for all."
        )
    if equals_baseline:
        return (
            f"One adapter is enough for these {len(tasks)} datasets: every one of them is served best by the adapter "
            "that was trained on all, so the ensemble is that adapter."
        )
    if reference is None or reference == "ensemble":
        return f"The ensemble's mean loss is {number(own)}; nothing else was scored to compare it with."
    other = mean_loss[reference]
    gain = _mean_difference("ensemble", reference, scores, mean_loss, intervals, reference)
    count = len({name for row in weights.values() for name, weight in row.items() if weight}) or 1
    adapters = f"{_spelled(count)} adapter{'s' if count != 1 else ''}"
    differences = _task_losses(scores, "ensemble", reference, intervals)
    better = [task for task, one in differences.items() if one.value < 0]
    clearly_worse = [task for task, one in differences.items() if one.value > 0 and one.is_clear]
    clearly_better = [task for task, one in differences.items() if one.value < 0 and one.is_clear]
    worse = f"; {_listed(clearly_worse)} {'does' if len(clearly_worse) == 1 else 'do'} worse" if clearly_worse else ""
    means = f"from {number(other)} to {number(own)} nats on average"
    s, share = "s" if count == 1 else "", f"{len(better)} of {len(tasks)} tasks"
    low, high = gain.interval
    noise = f"which other rows might undo (95 % interval of the difference {number(low)} to {number(high)})"
    though = ""
    if clearly_better:
        though = f" {_listed(clearly_better)} clearly {'gains' if len(clearly_better) == 1 else 'gain'}."
    if reference != BASELINE:
        untried = "Whether one adapter for all would do as well was not tried: set train_baseline=True."
        if not gain.is_clear:
            return f"{adapters} move{s} the base model's loss {means}, {noise}.{though} {untried}"
        return f"{adapters} lower{s} the base model's loss on {share}, {means}{worse}. {untried}"
    if gain.is_clear and gain.value < 0 and continues_baseline:
        lowers = f"trained further, lowers the loss on {share}, {means}"
        if clearly_worse:
            return f"The adapter for all, {lowers}{worse}."
        return f"One adapter is enough for these {len(tasks)} datasets: the one for all, {lowers}."
    if gain.is_clear and gain.value < 0:
        lowers = f"{adapters} lower{s} the loss on {share}, {means}{worse}."
        if not scaled_loss or other - scaled_loss[BASELINE] < _WORTH_SAYING * (other - own):
            return lowers
        alone, together = (number(scaled_loss[system]) for system in (BASELINE, "ensemble"))
        on_others = f"{alone} on validation rows that the scale was not fitted to, and the ensemble {together}"
        if scaled_loss["ensemble"] < scaled_loss[BASELINE]:
            return f"{lowers} With a scale of its logits, the one adapter for all has {on_others}."
        return (
            f"One adapter is enough for these {len(tasks)} datasets: with a scale of its logits, the one for all has "
            f"{on_others}."
        )
    if gain.is_clear:
        return (
            f"Use the one adapter for all: the ensemble raises the loss {means}, and on {len(tasks) - len(better)} of "
            f"{len(tasks)} tasks."
        )
    return (
        f"One adapter is enough for these {len(tasks)} datasets: {adapters[0].lower()}{adapters[1:]} move{s} the loss "
        f"{means}, {noise}.{though}"
    )


def _of_selection(
    scores: Mapping[str, TaskScores],
    base: Mapping[str, TaskScores],
    selection: SelectedTasks,
) -> str:
    targets = [task for task in selection.targets if task in scores]
    measured = sum(scores[task].loss for task in targets) / max(len(targets), 1)
    of_base = sum(base[task].loss for task in targets) / len(targets) if targets and set(targets) <= set(base) else None
    goal, auxiliary = _listed(list(selection.targets)), _listed(selection.auxiliary)
    loss, were = ("loss", "was") if len(selection.targets) == 1 else ("mean loss", "were")
    if of_base is not None and measured > of_base:
        return (
            f"Fine-tuning did not help {goal}: the {loss} is {number(measured)}, that of the base model "
            f"{number(of_base)}. Lower the learning rate, or train for fewer steps."
        )
    before = f", from the base model's {number(of_base)}" if of_base is not None else ""
    result = f"The {loss} of {goal} is {number(measured)}{before}"
    alone, predicted = selection.baselines.get("alone"), selection.predicted_loss
    if not selection.auxiliary:
        return f"No other dataset is predicted to help {goal}, which {were} fine-tuned alone. {result}."
    if alone is None or predicted is None:
        return f"{goal} {were} fine-tuned with {auxiliary}. {result}."
    them, verb = ("it", "helps") if len(selection.auxiliary) == 1 else ("them", "help")
    figures = f"{number(predicted)} with {them}, {number(alone)} alone"
    if predicted >= alone:
        are = "is" if len(selection.auxiliary) == 1 else "are"
        return f"{auxiliary} {are} not predicted to help {goal}: {figures}. {result}."
    return f"{auxiliary} {verb} {goal}: predicted {figures}. {result}."


def _harmful(harmful: Mapping[str, int], num_tasks: int) -> str:
    others = num_tasks - 1
    if not harmful or others < 1:
        return ""
    names = list(harmful)
    if len(names) == 1:
        hurt = "all others" if harmful[names[0]] >= others else f"{harmful[names[0]]} of {others} others"
        return f"{names[0]} is predicted to hurt {hurt}: leave it out."
    return f"{_listed(names)} are predicted to hurt the others: leave them out."


def _mean_difference(
    system: str,
    other: str,
    scores: Mapping[str, Mapping[str, TaskScores]],
    mean_loss: Mapping[str, float],
    intervals: Mapping[str, SystemIntervals],
    reference: str | None,
) -> Difference | None:
    """Of the mean losses of two systems; by their own intervals where these were not compared row by row."""
    if other not in scores or system not in scores:
        return None
    paired = intervals[system].mean_difference.get("loss") if system in intervals else None
    if other == reference and paired is not None:
        return paired
    value = mean_loss[system] - mean_loss[other]
    if system in intervals and other in intervals:
        one, two = intervals[system].mean["loss"], intervals[other].mean["loss"]
        return Difference(value, (one[0] - two[1], one[1] - two[0]))
    return Difference(value, (value, value))


def _task_losses(
    scores: Mapping[str, Mapping[str, TaskScores]],
    system: str,
    other: str,
    intervals: Mapping[str, SystemIntervals],
) -> dict[str, Difference]:
    known = intervals[system].differences if system in intervals else {}
    found = {}
    for task, own in scores[system].items():
        if task in scores[other]:
            value = own.loss - scores[other][task].loss
            found[task] = known.get(task, {}).get("loss") or Difference(value, (value, value))
    return found


def number(value: float) -> str:
    """Three decimals, and more for what would vanish."""
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"


def _spelled(count: int) -> str:
    words = ("One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve")
    return words[count - 1] if 1 <= count <= len(words) else str(count)


def _listed(names: Sequence[str]) -> str:
    if len(names) > _MOST_NAMES:
        return f"{', '.join(names[:_MOST_NAMES])} and {len(names) - _MOST_NAMES} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
