"""What a run has come to by now, from its records."""

from typing import Any

from ..ensemble.weighting.cross_validation import CHOSEN, adapter_candidate
from ..select import Grouping, Selection
from .boosting import Boosting
from .costs import Costs
from .directory import RunDirectory
from .evaluation import EvaluatedRows, Evaluation
from .fidelity_report import FidelityReport
from .records import EnsembleWeights, Estimate, RunRecord
from .results import Results, SelectionResult
from .systems import BASELINE


def run_results(run: RunDirectory) -> Results:
    """What the records of a run say by now.

    Raises:
        `RecordError`: for a run that was not evaluated yet, and for damaged records.
    """
    evaluation = run.read(Evaluation)
    split = evaluation.reported_split or "eval"
    scores = evaluation.scores.get(split, {})
    rows = (run.read_if_there(EvaluatedRows) or EvaluatedRows()).rows.get(split, {})
    outcome = _selection_outcome(run) if "selection" in scores else _ensemble_outcome(run)
    outcome["fidelity"] = run.read_if_there(FidelityReport)
    by_system = {name: {task: own.as_scores() for task, own in tasks.items()} for name, tasks in rows.items()}
    return Results.of(run.read(RunRecord), split, scores, by_system, run.read_if_there(Costs), **outcome)


def _ensemble_outcome(run: RunDirectory) -> dict[str, Any]:
    outcome: dict[str, Any] = {}
    estimate, grouping = run.read_if_there(Estimate), run.read_if_there(Grouping)
    if estimate is not None:
        outcome["harmful"] = {task: own.num_better for task, own in estimate.left_out.items() if own.is_harmful}
    if grouping is None:
        return outcome
    outcome["groups"] = grouping.groups
    if estimate is not None:
        outcome["predicted_loss"] = {
            task: estimate.predicted_loss[group][task]
            for group, tasks in grouping.groups.items()
            for task in tasks
            if group in estimate.predicted_loss
        }
    known = run.read_if_there(EnsembleWeights)
    if known is not None:
        boosting = run.read_if_there(Boosting) or Boosting()
        outcome["weights"] = boosting.weights(known.weights, known.scales)
        used = {name for row in outcome["weights"].values() for name, weight in row.items() if weight}
        outcome["equals_baseline"] = bool(used) and used <= _one_for_all(grouping)
        outcome["scaled_loss"] = _scaled_loss(known, grouping)
        goes_on = grouping.settings["group_initialization"] == "baseline"
        longer = _of_all_tasks(grouping) if goes_on else set()
        outcome["continues_baseline"] = bool(used & longer) and used <= longer | _one_for_all(grouping)
    return outcome


def _scaled_loss(weights: EnsembleWeights, grouping: Grouping) -> dict[str, float]:
    """Cross-validated mean loss of the one adapter for all, its logits scaled alone, and of the weights, if known."""
    names = [adapter_candidate(name) for name in (BASELINE, grouping.baseline_group) if name is not None]
    every = weights.cross_validated.values()
    pairs = [(losses[name], losses[CHOSEN]) for losses in every for name in names if name in losses]
    if len(pairs) != len(grouping.task_names):
        return {}
    alone, chosen = (sum(losses) / len(losses) for losses in zip(*pairs))
    return {BASELINE: alone, "ensemble": chosen}


def _one_for_all(grouping: Grouping) -> set[str]:
    """Names of the adapters that are trained on all tasks from the start, by their sampling weights."""
    alike = {BASELINE}
    if grouping.baseline_group is not None:
        alike.add(grouping.baseline_group)
    if grouping.settings["group_initialization"] == "fresh":
        alike |= _of_all_tasks(grouping)
    return alike


def _of_all_tasks(grouping: Grouping) -> set[str]:
    """Names of the groups beside the one for all that are trained on all tasks, by their sampling weights."""
    everything = dict.fromkeys(grouping.task_names, 1.0)
    return {name for name, own in grouping.mixtures.items() if own == everything and name != grouping.baseline_group}


def _selection_outcome(run: RunDirectory) -> dict[str, Any]:
    found = run.read_if_there(Selection)
    if found is None:
        return {}
    predicted = found.path[-1]["predicted_loss"] if found.path else None
    result = SelectionResult(list(found.targets), found.tasks, found.summary, predicted, found.baselines)
    outcome: dict[str, Any] = {"selection": result}
    if predicted is not None and len(found.targets) == 1:
        outcome["predicted_loss"] = {result.targets[0]: predicted}
    return outcome
