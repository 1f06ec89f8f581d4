"""Searches for the subset of tasks with the best predicted score: forward, backward, exhaustive, random ensemble."""

from collections.abc import Iterable
from itertools import combinations
from math import comb
from typing import Any

import numpy as np

from ..errors import ConfigurationError
from .problem import SelectionProblem
from .provenance import caution, settings_of
from .selection import Selection
from .subsets import random_subsets

# Subsets that an exhaustive search predicts at most: a second's work.
_MOST_SUBSETS = 20_000
# Close calls of an exhaustive search that are kept.
_NUM_CLOSE = 10


def forward_selection(problem: SelectionProblem) -> Selection:
    """Add, step by step, the task whose addition improves the targets' predicted score most; stop when none does."""
    chosen, path, order, scores = problem.required.copy(), [], problem.named(problem.required), {}
    best = np.inf
    if chosen.any():
        scored = problem.score(chosen[None])
        best = float(scored.value[0])
        path.append({"added": ", ".join(order), **problem.step(scored, 0), "close_calls": []})
    while True:
        candidates = [i for i in np.flatnonzero(problem.free & ~chosen) if problem.fits(_with(chosen, i))]
        if not candidates:
            break
        scored = problem.score(np.stack([_with(chosen, i) for i in candidates]))
        scores.update({problem.names[i]: float(value) for i, value in zip(candidates, scored.value)})
        winner = int(np.argmin(scored.value))
        if scored.value[winner] >= best:
            break
        best = float(scored.value[winner])
        chosen = _with(chosen, candidates[winner])
        order.append(problem.names[candidates[winner]])
        close = problem.close_calls(scored, winner)
        others = [problem.names[i] for i, is_close in zip(candidates, close) if is_close]
        path.append({"added": order[-1], **problem.step(scored, winner), "close_calls": others})
    return selection_of(problem, "forward", order, scores, path)


def backward_selection(problem: SelectionProblem) -> Selection:
    """Leave out, step by step, the task without which the predicted score is best.

    It begins with all tasks that may be in and stops, within the budget, when leaving out none improves the score.
    """
    chosen, scores = problem.required | problem.free, {}
    scored = problem.score(chosen[None])
    best = float(scored.value[0])
    path = [{"added": ", ".join(problem.named(chosen)), **problem.step(scored, 0), "close_calls": []}]
    while True:
        candidates = np.flatnonzero(problem.free & chosen)
        if not len(candidates) or chosen.sum() == 1:
            break
        scored = problem.score(np.stack([_without(chosen, i) for i in candidates]))
        scores.update({problem.names[i]: float(best - value) for i, value in zip(candidates, scored.value)})
        winner = int(np.argmin(scored.value))
        if scored.value[winner] >= best and problem.fits(chosen):
            break
        best = float(scored.value[winner])
        chosen = _without(chosen, candidates[winner])
        close = problem.close_calls(scored, winner)
        others = [problem.names[i] for i, is_close in zip(candidates, close) if is_close]
        removed = problem.names[candidates[winner]]
        path.append({"removed": removed, **problem.step(scored, winner), "close_calls": others})
    kept = sorted(problem.named(chosen & ~problem.required), key=lambda name: scores.get(name, 0.0))
    return selection_of(problem, "backward", [*problem.named(problem.required), *kept], scores, path)


def exhaustive_selection(problem: SelectionProblem) -> Selection:
    """The best of all subsets within the budget.

    Raises:
        `ConfigurationError`: where these are more than 20,000.
    """
    free = np.flatnonzero(problem.free)
    most = len(free) if problem.budgets["max_tasks"] is None else min(len(free), problem.budgets["max_tasks"])
    total = sum(comb(len(free), size) for size in range(most + 1))
    if total > _MOST_SUBSETS:
        raise ConfigurationError(
            f"{len(free)} tasks to choose from make {total} subsets; an exhaustive search takes at most "
            f"{_MOST_SUBSETS}. Exclude tasks, lower max_tasks, or choose another method."
        )
    masks = [
        mask
        for size in range(most + 1)
        for own in combinations(free, size)
        if (mask := _with(problem.required, list(own))).any() and problem.fits(mask)
    ]
    scored = problem.score(np.stack(masks))
    best = int(np.argmin(scored.value))
    close = [int(row) for row in np.argsort(scored.value) if problem.close_calls(scored, best)[row]][:_NUM_CLOSE]
    held = np.stack(masks)
    scores = {problem.names[i]: float(scored.value[held[:, i]].min()) for i in free if held[:, i].any()}
    chosen = sorted(problem.named(masks[best] & ~problem.required), key=scores.get)
    path = [
        {
            "added": ", ".join(problem.named(masks[best])),
            **problem.step(scored, best),
            "close_calls": [", ".join(problem.named(masks[row])) for row in close],
        }
    ]
    return selection_of(problem, "exhaustive", [*problem.named(problem.required), *chosen], scores, path)


def random_ensemble_selection(
    problem: SelectionProblem,
    num_subsets: int = 500,
    subset_size: int | None = None,
    seed: int = 0,
    threshold: float | None = None,
) -> Selection:
    """Score each task by the mean predicted score of the random subsets that hold it (GradEx, arXiv 2409.19458).

    Every subset holds the tasks that have to be in. A task is taken when its score is below the threshold, the best
    first until the budget is used.

    Args:
        problem (`SelectionProblem`): what is asked.
        num_subsets (`int`, *optional*, defaults to 500): random subsets.
        subset_size (`int`, *optional*): free tasks of a subset; a third of them by default.
        seed (`int`, *optional*, defaults to 0): seed of the subsets.
        threshold (`float`, *optional*): score below which a task is taken; the mean of all subsets by default.
    """
    free = np.flatnonzero(problem.free)
    if not len(free):
        return forward_selection(problem)
    size = subset_size or max(1, round(len(free) / 3))
    masks = np.tile(problem.required, (num_subsets, 1))
    masks[:, free] = random_subsets(len(free), size, num_subsets, seed) > 0
    values = problem.score(masks).value
    held = masks[:, free]
    means = (held * values[:, None]).sum(0) / np.maximum(held.sum(0), 1)
    limit = float(values.mean()) if threshold is None else threshold
    chosen, order = problem.required.copy(), problem.named(problem.required)
    ranks = np.argsort(means, kind="stable")
    for rank in ranks:
        added = _with(chosen, free[rank])
        if held[:, rank].any() and means[rank] < limit and problem.fits(added):
            chosen = added
            order.append(problem.names[free[rank]])
    if not chosen.any():
        # Something has to be trained on.
        chosen = _with(chosen, free[ranks[0]])
        order = problem.named(chosen)
    scored = problem.score(chosen[None])
    path = [{"added": ", ".join(order), **problem.step(scored, 0), "close_calls": []}]
    scores = {problem.names[free[rank]]: float(means[rank]) for rank in ranks}
    own = {"num_subsets": num_subsets, "subset_size": size, "seed": seed, "threshold": limit}
    return selection_of(problem, "random_ensemble", order, scores, path, own)


def selection_of(
    problem: SelectionProblem,
    method: str,
    tasks: list[str],
    scores: dict[str, float],
    path: list[dict[str, Any]],
    settings: dict[str, Any] | None = None,
) -> Selection:
    """A choice with its sentence and its settings; the path ends with the tasks chosen."""
    loss = path[-1]["predicted_loss"]
    targets = _listed(problem.targets)
    alone = problem.score(problem.required[None]) if problem.required.any() else None
    if alone is None:
        why = f"Predicted validation loss of {targets} is {loss:.4f} with {_listed(tasks)}."
    elif set(tasks) > set(problem.named(problem.required)):
        added = [task for task in tasks if not problem.required[problem.names.index(task)]]
        before = problem.step(alone, 0)["predicted_loss"]
        verb = "falls" if loss < before else "goes"
        why = f"Predicted validation loss of {targets} {verb} from {before:.4f} to {loss:.4f} with {_listed(added)}."
    else:
        why = f"No task is predicted to help {targets} ({loss:.4f})."
    return Selection(
        problem.targets,
        tasks,
        method,
        scores,
        path,
        why + caution(problem.estimator),
        settings_of(problem.estimator, {**problem.settings, **(settings or {})}),
    )


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names) if len(names) <= most else f"{', '.join(names[:most])} and {len(names) - most} more"


def _with(mask: np.ndarray, index: Any) -> np.ndarray:
    mask = mask.copy()
    mask[index] = True
    return mask


def _without(mask: np.ndarray, index: int) -> np.ndarray:
    mask = mask.copy()
    mask[index] = False
    return mask
