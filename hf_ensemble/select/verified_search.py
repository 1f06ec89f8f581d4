"""Forward selection whose candidates are verified by what the model does at their predicted parameters."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..errors import ConfigurationError
from .problem import SelectionProblem, SubsetScores
from .searches import make_selection
from .selection import Selection

# From a surrogate's optimum `(k,)` to the score of the model there; higher is better.
Verify = Callable[[np.ndarray], float]


def verified_selection(problem: SelectionProblem, verify: Verify | None) -> Selection:
    """Greedily add the task with the best verified score on the targets; stop when no verified task improves it.

    Candidates of a step are ranked by predicted loss, and the first `verified_candidates` of them are verified with
    their predicted parameters in the model, as in GradEx (arXiv 2409.19458). Between equal scores the predicted loss
    decides, so that a score that never changes leaves plain forward selection. After `max_verified` candidates the
    search ends with the best one verified.

    Args:
        problem (`SelectionProblem`): the problem.
        verify (`Callable`): from the coefficients of a surrogate's optimum to a score, higher is better.

    Raises:
        `ConfigurationError`: without `verify`.
    """
    if verify is None:
        raise ConfigurationError(
            "metric='answers' needs the model, to generate answers at predicted parameters. Use SelectionSFTTrainer "
            "with selection_metric='answers', or another metric."
        )
    search = _Search(problem, verify)
    chosen, path, order, scores = problem.required.copy(), [], problem.names_of(problem.required), {}
    best = (-np.inf, np.inf)
    if chosen.any():
        scored = problem.score(chosen[None])
        answered = search.verified(scored, 0)
        best = (answered, float(scored.value[0]))
        path.append(_entry(problem, scored, 0, ", ".join(order), answered))
    while search.left > 0:
        candidates = [i for i in np.flatnonzero(problem.optional & ~chosen) if problem.fits(_with(chosen, i))]
        if not candidates:
            break
        scored = problem.score(np.stack([_with(chosen, i) for i in candidates]))
        scores.update({problem.names[i]: float(value) for i, value in zip(candidates, scored.value)})
        ranked = np.argsort(scored.value, kind="stable")[: min(problem.settings.verified_candidates, search.left)]
        found = {int(row): search.verified(scored, int(row)) for row in ranked}
        winner = max(found, key=lambda row: (found[row], -scored.value[row]))
        reached = (found[winner], float(scored.value[winner]))
        if reached[0] < best[0] or (reached[0] == best[0] and reached[1] >= best[1]):
            break
        best = reached
        chosen = _with(chosen, candidates[winner])
        order.append(problem.names[candidates[winner]])
        entry = _entry(problem, scored, winner, order[-1], found[winner])
        entry["verified"] = {problem.names[candidates[row]]: score for row, score in found.items()}
        path.append(entry)
    selection = make_selection(problem, "forward", order, scores, path)
    verified = f" Verified by generated answers: {path[0]['answered']:.3f} to {path[-1]['answered']:.3f}."
    return replace(selection, summary=selection.summary + verified)


class _Search:
    """Verifies candidates within the budget."""

    def __init__(self, problem: SelectionProblem, verify: Verify):
        self._verify = verify
        limit = problem.settings.max_verified
        self.left = np.inf if limit is None else limit

    def verified(self, scored: SubsetScores, row: int) -> float:
        self.left -= 1
        return float(self._verify(scored.prediction.coefficients[row]))


def _entry(problem: SelectionProblem, scored: SubsetScores, row: int, added: str, answered: float) -> dict:
    return {"added": added, **problem.path_entry(scored, row), "answered": answered, "close_calls": []}


def _with(mask: np.ndarray, index: int) -> np.ndarray:
    mask = mask.copy()
    mask[index] = True
    return mask
