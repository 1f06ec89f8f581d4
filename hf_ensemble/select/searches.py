"""Searches for the subset of tasks with the best predicted score: forward, backward, exhaustive, random ensemble."""

from collections.abc import Iterable
from itertools import combinations
from math import comb
from typing import Any

import numpy as np

from .._settings import check_at_least, check_number
from ..errors import ConfigurationError
from .choice import calibration_note, with_provenance
from .problem import SelectionProblem
from .selection import Selection
from .subsets import random_subsets

# Maximum number of subsets that an exhaustive search predicts: seconds to half a minute on a CPU core.
_MAX_SUBSETS = 20_000
# Maximum number of close calls that an exhaustive search reports.
_NUM_CLOSE = 10


def forward_selection(problem: SelectionProblem) -> Selection:
    """Greedily add the task that improves the targets' predicted score most; stop when no task improves it."""
    chosen, path, order, scores = problem.required.copy(), [], problem.names_of(problem.required), {}
    best, optimum = np.inf, None
    if chosen.any():
        scored = problem.score(chosen[None])
        best, optimum = float(scored.value[0]), scored.prediction.coefficients[0]
        path.append({"added": ", ".join(order), **problem.path_entry(scored, 0), "close_calls": []})
    while True:
        candidates = [i for i in np.flatnonzero(problem.optional & ~chosen) if problem.fits(_with(chosen, i))]
        if not candidates:
            break
        scored = problem.score_toggled(chosen, candidates, optimum)
        winner = scored.best
        is_last = scored.value[winner] >= best or not any(
            problem.fits(_with(_with(chosen, candidates[winner]), i)) for i in candidates if i != candidates[winner]
        )
        if is_last and not scored.is_exact:
            # What ends the search, and the scores that it reports, are predicted and not estimated.
            scored = problem.score(np.stack([_with(chosen, i) for i in candidates]))
            winner = scored.best
        scores.update({problem.names[i]: float(value) for i, value in zip(candidates, scored.value)})
        if scored.value[winner] >= best:
            break
        best, optimum = float(scored.value[winner]), scored.prediction.coefficients[winner]
        chosen = _with(chosen, candidates[winner])
        order.append(problem.names[candidates[winner]])
        close = problem.close_calls(scored, winner)
        others = [problem.names[i] for i, is_close in zip(candidates, close) if is_close]
        path.append({"added": order[-1], **problem.path_entry(scored, winner), "close_calls": others})
    return make_selection(problem, "forward", order, scores, path)


def backward_selection(problem: SelectionProblem) -> Selection:
    """Start with all allowed tasks and greedily remove the task without which the predicted score is best.

    The search stops, within the budget, when no removal improves the score.
    """
    chosen, scores = problem.required | problem.optional, {}
    scored = problem.score(chosen[None])
    best, optimum = float(scored.value[0]), scored.prediction.coefficients[0]
    path = [{"added": ", ".join(problem.names_of(chosen)), **problem.path_entry(scored, 0), "close_calls": []}]
    while True:
        candidates = np.flatnonzero(problem.optional & chosen & ~_last_that_fits(problem, chosen))
        if not len(candidates) or chosen.sum() == 1:
            break
        scored = problem.score_toggled(chosen, candidates, optimum)
        winner = scored.best
        is_last = (scored.value[winner] >= best and problem.fits(chosen)) or chosen.sum() == 2
        if is_last and not scored.is_exact:
            scored = problem.score(np.stack([_without(chosen, i) for i in candidates]))
            winner = scored.best
        scores.update({problem.names[i]: float(best - value) for i, value in zip(candidates, scored.value)})
        if scored.value[winner] >= best and problem.fits(chosen):
            break
        best, optimum = float(scored.value[winner]), scored.prediction.coefficients[winner]
        chosen = _without(chosen, candidates[winner])
        close = problem.close_calls(scored, winner)
        others = [problem.names[i] for i, is_close in zip(candidates, close) if is_close]
        removed = problem.names[candidates[winner]]
        path.append({"removed": removed, **problem.path_entry(scored, winner), "close_calls": others})
    kept = sorted(problem.names_of(chosen & ~problem.required), key=lambda name: scores.get(name, 0.0))
    return make_selection(problem, "backward", [*problem.names_of(problem.required), *kept], scores, path)


def _last_that_fits(problem: SelectionProblem, chosen: np.ndarray) -> np.ndarray:
    """The task without which no part of a subset `(T,)` is within the budget, if there is one, as a mask `(T,)`."""
    left = chosen & problem.fits_alone
    return left if not problem.required.any() and left.sum() == 1 else np.zeros_like(chosen)


def checked_subset_size(num_optional: int, limit: int | None) -> int:
    """The largest number of optional tasks that a subset holds, in an exhaustive search.

    Raises:
        `ConfigurationError`: for more than 20,000 subsets.
    """
    max_size = num_optional if limit is None else min(num_optional, limit)
    total = sum(comb(num_optional, size) for size in range(max_size + 1))
    if total > _MAX_SUBSETS:
        raise ConfigurationError(
            f"{num_optional} optional tasks make {total} subsets; an exhaustive search takes at most {_MAX_SUBSETS}. "
            "Exclude tasks, lower max_auxiliary, or use another method."
        )
    return max_size


def exhaustive_selection(problem: SelectionProblem) -> Selection:
    """The best of all subsets within the budget.

    Raises:
        `ConfigurationError`: for more than 20,000 subsets.
    """
    optional = np.flatnonzero(problem.optional)
    limit = problem.settings.max_auxiliary
    # Targets that need not be trained on are no auxiliary tasks.
    free = sum(problem.names[i] in problem.targets for i in optional)
    max_size = checked_subset_size(len(optional), None if limit is None else limit + free)
    masks = np.stack(
        [
            mask
            for size in range(max_size + 1)
            for subset in combinations(optional, size)
            if (mask := _with(problem.required, list(subset))).any() and problem.fits(mask)
        ]
    )
    scored = problem.score(masks)
    ranked = np.argsort(scored.value, kind="stable")
    best = int(ranked[0])
    is_close = problem.close_calls(scored, best)
    close = [", ".join(problem.names_of(masks[row])) for row in ranked[is_close[ranked]][:_NUM_CLOSE]]
    scores = {problem.names[i]: float(scored.value[masks[:, i]].min()) for i in optional if masks[:, i].any()}
    chosen = sorted(problem.names_of(masks[best] & ~problem.required), key=scores.get)
    added = ", ".join(problem.names_of(masks[best]))
    path = [{"added": added, **problem.path_entry(scored, best), "close_calls": close}]
    return make_selection(problem, "exhaustive", [*problem.names_of(problem.required), *chosen], scores, path)


def random_ensemble_selection(
    problem: SelectionProblem,
    num_subsets: int = 500,
    subset_size: int | None = None,
    seed: int = 0,
    threshold: float | None = None,
) -> Selection:
    """Score each task by the mean predicted score of the random subsets that contain it (GradEx, arXiv 2409.19458).

    Every subset contains the required tasks. Tasks that score below the threshold are selected, best first, until the
    budget is used up.

    Args:
        problem (`SelectionProblem`): the problem.
        num_subsets (`int`, *optional*, defaults to 500): number of random subsets.
        subset_size (`int`, *optional*): number of optional tasks in a subset. A third of them by default.
        seed (`int`, *optional*, defaults to 0): seed of the subsets.
        threshold (`float`, *optional*): score below which a task is selected. The mean over all subsets by default.

    Raises:
        `ConfigurationError`: for values out of range.
    """
    check_number("threshold", threshold, optional=True)
    check_at_least("num_subsets", num_subsets, 1)
    check_at_least("subset_size", subset_size, 1, optional=True)
    optional = np.flatnonzero(problem.optional)
    if not len(optional):
        return forward_selection(problem)
    size = subset_size or max(1, round(len(optional) / 3))
    masks = np.tile(problem.required, (num_subsets, 1))
    masks[:, optional] = random_subsets(len(optional), size, num_subsets, seed) > 0
    values = problem.score(masks).value
    held = masks[:, optional]
    means = (held * values[:, None]).sum(0) / np.maximum(held.sum(0), 1)
    limit = float(values.mean()) if threshold is None else threshold
    chosen, order = problem.required.copy(), problem.names_of(problem.required)
    ranks = np.argsort(means, kind="stable")
    for rank in ranks:
        added = _with(chosen, optional[rank])
        if held[:, rank].any() and means[rank] < limit and problem.fits(added):
            chosen = added
            order.append(problem.names[optional[rank]])
    if not chosen.any():
        # There has to be something to train on.
        chosen = _with(chosen, next(optional[rank] for rank in ranks if problem.fits_alone[optional[rank]]))
        order = problem.names_of(chosen)
    scored = problem.score(chosen[None])
    path = [{"added": ", ".join(order), **problem.path_entry(scored, 0), "close_calls": []}]
    scores = {problem.names[optional[rank]]: float(means[rank]) for rank in ranks}
    options = {"num_subsets": num_subsets, "subset_size": size, "seed": seed, "threshold": limit}
    return make_selection(problem, "random_ensemble", order, scores, path, options)


def make_selection(
    problem: SelectionProblem,
    method: str,
    tasks: list[str],
    scores: dict[str, float],
    path: list[dict[str, Any]],
    options: dict[str, Any] | None = None,
) -> Selection:
    """A [`Selection`] with its summary and settings; the last step of the path is the selected subset."""
    loss = path[-1]["predicted_loss"]
    targets = _join_names(problem.targets)
    required = problem.names_of(problem.required)
    if not required:
        summary = f"The predicted validation loss of {targets} is {loss:.4f} with {_join_names(tasks)}."
    elif set(tasks) > set(required):
        before = problem.path_entry(problem.score(problem.required[None]), 0)["predicted_loss"]
        added = _join_names(task for task in tasks if task not in required)
        verb = "falls" if loss < before else "goes"
        summary = f"The predicted validation loss of {targets} {verb} from {before:.4f} to {loss:.4f} with {added}."
    else:
        summary = f"No task is predicted to help {targets} ({loss:.4f})."
    return Selection(
        problem.targets,
        tasks,
        method,
        scores,
        path,
        summary=summary + calibration_note(problem.estimator),
        settings=with_provenance({**problem.arguments(), **(options or {})}, problem.estimator),
    )


def _join_names(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    return ", ".join(names) if len(names) <= limit else f"{', '.join(names[:limit])} and {len(names) - limit} more"


def _with(mask: np.ndarray, index: Any) -> np.ndarray:
    mask = mask.copy()
    mask[index] = True
    return mask


def _without(mask: np.ndarray, index: int) -> np.ndarray:
    mask = mask.copy()
    mask[index] = False
    return mask
