"""The ways to choose for a target, by name."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import ConfigurationError
from .baselines import all_tasks, predicted_baselines, random_selection, similarity_selection, targets_alone
from .mixture import optimise_mixture
from .problem import SelectionProblem
from .searches import (
    backward_selection,
    exhaustive_selection,
    forward_selection,
    random_ensemble_selection,
    selection_of,
)
from .selection import Selection

_SEARCHES: dict[str, Callable[..., Selection]] = {
    "forward": forward_selection,
    "backward": backward_selection,
    "exhaustive": exhaustive_selection,
    "random_ensemble": random_ensemble_selection,
}
SELECTION_METHODS = (*_SEARCHES, "mixture", "all", "alone", "random", "gradient_similarity")


def mixture_selection(problem: SelectionProblem, caps: float = 1.0) -> Selection:
    """The targets and their helpers with the sampling weights of [`optimise_mixture`], the most drawn first.

    Args:
        problem (`SelectionProblem`):
            What is asked. Of `max_tasks`, those tasks that are drawn most are weighed anew.
        caps (`float`, *optional*, defaults to 1.0): largest weight of a row of an auxiliary task; a target's is 1.

    Raises:
        `ConfigurationError`: for another budget than `max_tasks`, tasks beside the targets that have to be in, and
            another metric than the loss.
    """
    estimator, names, targets = problem.estimator, problem.names, problem.targets
    helpers = set(problem.named(problem.required)) - set(targets)
    if problem.metric != "loss" or helpers or set(problem.settings) & {"max_examples", "max_tokens"}:
        raise ConfigurationError(
            "A mixture lowers the loss within max_tasks and exclude; it takes no other metric, budget or include. "
            "Choose the tasks by another method, then weigh them with DataSelector.mixture."
        )
    allowed = {name: caps * float(free or name in targets) for name, free in zip(names, problem.free)}
    mixture = optimise_mixture(estimator, targets, allowed)
    drawn = sorted(set(mixture.probabilities) - set(targets), key=mixture.probabilities.get, reverse=True)
    limit = problem.budgets["max_tasks"]
    if limit is not None and len(drawn) > limit:
        kept = dict.fromkeys(names, 0.0) | {name: allowed[name] for name in drawn[:limit]}
        mixture = optimise_mixture(estimator, targets, kept)
        drawn = [task for task in drawn if task in mixture.weights]
    tasks = [*(target for target in targets if target in mixture.weights), *drawn]
    shared = dict(zip(names, estimator.sampling_weights))
    pairs = np.eye(len(names), dtype=bool) | problem.required
    scores = {name: float(value) for name, value in zip(names, problem.score(pairs).value) if name not in targets}
    path = [
        {"added": ", ".join(mixture.subset), "predicted_loss": mixture.subset_loss},
        {"added": "weights", "predicted_loss": mixture.predicted_loss},
    ]
    selection = selection_of(problem, "mixture", tasks, scores, path, {"caps": caps})
    return replace(
        selection, why=mixture.why, weights={task: mixture.weights[task] / float(shared[task]) for task in tasks}
    )


def select_tasks(
    problem: SelectionProblem, method: str = "forward", similarity: np.ndarray | None = None, **options: Any
) -> Selection:
    """Run one method by name, with the baselines' predicted losses beside it.

    Args:
        problem (`SelectionProblem`): what is asked.
        method (`str`, *optional*, defaults to `"forward"`): one of `SELECTION_METHODS`.
        similarity (`np.ndarray` of shape `(T, T)`, *optional*): [`mean_cosines`] of the gradients, for the baseline.
        options: further arguments of the method.

    Raises:
        `ConfigurationError`: for another name, or similarities that are not there.
    """
    if method not in SELECTION_METHODS:
        raise ConfigurationError(f"method has to be one of {SELECTION_METHODS}, found {method!r}.")
    if method in _SEARCHES:
        selection = _SEARCHES[method](problem, **options)
    elif method == "mixture":
        selection = mixture_selection(problem, **options)
    elif method in ("all", "alone"):
        selection = (all_tasks if method == "all" else targets_alone)(problem, **options)
    else:
        size = options.pop("size", problem.budgets["max_tasks"])
        if size is None:
            # As many as a search takes that may choose.
            size = len(forward_selection(problem).tasks) - int(problem.required.sum())
        if method == "random":
            selection = random_selection(problem, size, **options)
        elif similarity is None:
            raise ConfigurationError("gradient_similarity needs the gradients: make the selector with from_store.")
        else:
            selection = similarity_selection(problem, size, similarity, **options)
    chosen = len(set(selection.tasks) - set(problem.named(problem.required)))
    return replace(selection, baselines=predicted_baselines(problem, chosen, similarity))
