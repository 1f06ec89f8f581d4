"""Searches that look at a sample of rows: what they come to is predicted from all rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .problem import SelectionProblem
from .searches import make_selection
from .selection import Selection

# Number of steps of a search that are predicted at once, and how often: each time between the neighbours of the best.
_NUM_STEPS, _NUM_ROUNDS = 12, 2


@dataclass(frozen=True)
class _Step:
    """A subset on the search's path, predicted from all rows."""

    subset: np.ndarray
    value: float
    entry: dict[str, Any]
    optimum: np.ndarray


def greedy_selection(problem: SelectionProblem, search: Callable[[SelectionProblem], Selection]) -> Selection:
    """Forward or backward selection; see [`sampled_selection`] for many rows."""
    return sampled_selection(problem, search) if problem.has_many_rows else search(problem)


def sampled_selection(problem: SelectionProblem, search: Callable[[SelectionProblem], Selection]) -> Selection:
    """Search greedily on a sample of rows, and stop where all rows say so.

    A sample ranks tasks well, but does not know where to stop. Subsets along the search's path are therefore predicted
    from all rows: some at equal distances, then those between the neighbours of the best one. The path that is reported
    has these subsets, up to the best one. There, one more step is made from all rows if it helps: every change by one
    task is estimated, and the best few are predicted.

    Args:
        problem (`SelectionProblem`): the problem, on all rows.
        search (`Callable`): forward or backward selection.
    """
    found = search(problem.for_search())
    steps = _predicted(problem, _subsets(problem, found))
    best = min(range(len(steps)), key=lambda place: steps[place].value)
    word, path, scores = "added", [], {}
    for before, step in zip([None, *steps], steps[: best + 1]):
        changed = problem.names_of(step.subset if before is None else step.subset ^ before.subset)
        path.append({word: ", ".join(changed), **step.entry, "close_calls": []})
        scores.update({name: _score(found, before, step.value) for name in changed})
        word = "added" if found.method == "forward" else "removed"
    last, entry = _last_step(problem, found, steps[best], scores)
    if entry is not None:
        path.append(entry)
    required = problem.names_of(problem.required)
    ranked = sorted(problem.names_of(last & ~problem.required), key=lambda name: _rank(found, name))
    scores = {name: value for name, value in scores.items() if name not in required}
    return make_selection(problem, found.method, [*required, *ranked], scores, path)


def _subsets(problem: SelectionProblem, found: Selection) -> np.ndarray:
    """Subsets along the path of a search, `(P, T)`, that are within the budget."""
    start = problem.required.copy() if found.method == "forward" else problem.required | problem.optional
    subsets = [start]
    changed = [entry.get("removed") for entry in found.path] if found.method == "backward" else found.tasks
    for name in changed:
        if name is not None and not (found.method == "forward" and problem.required[problem.names.index(name)]):
            subsets.append(subsets[-1].copy())
            subsets[-1][problem.names.index(name)] = found.method == "forward"
    return np.stack([subset for subset in subsets if subset.any() and problem.fits(subset)])


def _predicted(problem: SelectionProblem, subsets: np.ndarray) -> list[_Step]:
    """Some of the subsets, in their order, with the best one that was found and its neighbours."""
    steps: dict[int, _Step] = {}
    first, last = 0, len(subsets) - 1
    for _ in range(_NUM_ROUNDS):
        asked = np.unique(np.linspace(first, last, min(_NUM_STEPS, last - first + 1)).round().astype(int))
        asked = [int(place) for place in asked if int(place) not in steps]
        if asked:
            scored = problem.score(subsets[asked])
            for row, place in enumerate(asked):
                optimum = scored.prediction.coefficients[row]
                steps[place] = _Step(subsets[place], float(scored.value[row]), problem.path_entry(scored, row), optimum)
        known = sorted(steps)
        best = known.index(min(known, key=lambda place: steps[place].value))
        first, last = known[max(best - 1, 0)], known[min(best + 1, len(known) - 1)]
    return [steps[place] for place in sorted(steps)]


def _last_step(
    problem: SelectionProblem, found: Selection, step: _Step, scores: dict[str, float]
) -> tuple[np.ndarray, dict[str, Any] | None]:
    """The subset after one more change, and its entry in the path, if it helps; adds the scores of all changes."""
    is_forward = found.method == "forward"
    tasks = np.flatnonzero(problem.optional & (step.subset != is_forward))
    after = np.repeat(step.subset[None], len(tasks), axis=0)
    after[np.arange(len(tasks)), tasks] = is_forward
    fits = np.array([subset.any() and problem.fits(subset) for subset in after], dtype=bool)
    tasks, after = tasks[fits], after[fits]
    if not len(tasks):
        return step.subset, None
    scored = problem.estimate_toggled(step.subset, tasks, step.optimum)
    scores.update({problem.names[task]: _score(found, step, float(own)) for task, own in zip(tasks, scored.value)})
    best = scored.best
    if scored.value[best] >= step.value:
        return step.subset, None
    is_close = problem.close_calls(scored, best)
    return after[best], {
        "added" if is_forward else "removed": problem.names[tasks[best]],
        **problem.path_entry(scored, best),
        "close_calls": [problem.names[task] for task, close in zip(tasks, is_close) if close],
    }


def _score(found: Selection, before: _Step | None, value: float) -> float:
    """A task's score: that of the subset with it, or by how much the score falls without it."""
    return value if found.method == "forward" else (0.0 if before is None else before.value - value)


def _rank(found: Selection, name: str) -> int:
    return found.tasks.index(name) if name in found.tasks else len(found.tasks)
