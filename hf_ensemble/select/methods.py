"""Selection methods by name."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from .._settings import check_at_least, check_number, check_options
from ..errors import ConfigurationError
from .baselines import all_tasks, predicted_baselines, random_selection, similarity_selection, targets_alone
from .mixture import optimize_mixture
from .problem import SelectionProblem
from .sampled_search import greedy_selection
from .searches import (
    backward_selection,
    exhaustive_selection,
    forward_selection,
    make_selection,
    random_ensemble_selection,
)
from .selection import Selection
from .verified_search import Verify, verified_selection


def mixture_selection(problem: SelectionProblem, caps: float = 1.0) -> Selection:
    """The tasks and sampling weights of [`optimize_mixture`], the most sampled first.

    Args:
        problem (`SelectionProblem`):
            The problem. With more than `max_auxiliary` tasks in the mixture, the most sampled ones are weighted again.
        caps (`float`, *optional*, defaults to 1.0): maximum weight of a row of an auxiliary task; a target's is 1.

    Raises:
        `ConfigurationError`: for budgets other than `max_auxiliary`, required tasks besides the targets, excluded
            targets, and metrics other than the loss.
    """
    check_number("caps", caps, 0, 1)
    estimator, names, targets = problem.estimator, problem.names, problem.targets
    required = set(problem.names_of(problem.required)) - set(targets)
    without = [name for name in targets if not (problem.required | problem.optional)[names.index(name)]]
    if without:
        raise ConfigurationError(
            f"method='mixture' gives the targets a weight, and {without} are excluded. Do not exclude them, or use "
            "another method."
        )
    if required:
        raise ConfigurationError(
            f"method='mixture' gives every task the weight that is best, and include requires {sorted(required)}. "
            "Leave include out, or select by another method and weight the tasks with DataSelector.mixture."
        )
    allowed = {name: caps * float(optional or name in targets) for name, optional in zip(names, problem.optional)}
    mixture = optimize_mixture(estimator, targets, allowed, search_rows=problem.settings.search_rows)
    auxiliary = sorted(set(mixture.probabilities) - set(targets), key=mixture.probabilities.get, reverse=True)
    limit = problem.settings.max_auxiliary
    if limit is not None and len(auxiliary) > limit:
        kept = dict.fromkeys(names, 0.0) | {name: allowed[name] for name in auxiliary[:limit]}
        mixture = optimize_mixture(estimator, targets, kept, search_rows=problem.settings.search_rows)
        auxiliary = [task for task in auxiliary if task in mixture.weights]
    tasks = [*(target for target in targets if target in mixture.weights), *auxiliary]
    sampling_weights = dict(zip(names, estimator.sampling_weights))
    pairs = np.eye(len(names), dtype=bool) | problem.required
    scores = {name: float(value) for name, value in zip(names, problem.score(pairs).value) if name not in targets}
    path = [
        {"added": ", ".join(mixture.subset), "predicted_loss": mixture.subset_loss},
        {"added": "weights", "predicted_loss": mixture.predicted_loss},
    ]
    weights = {task: mixture.weights[task] / float(sampling_weights[task]) for task in tasks}
    selection = make_selection(problem, "mixture", tasks, scores, path, {"caps": caps})
    return replace(selection, summary=mixture.summary, weights=weights)


_SEARCHES: dict[str, Callable[..., Selection]] = {
    "forward": forward_selection,
    "backward": backward_selection,
    "exhaustive": exhaustive_selection,
    "random_ensemble": random_ensemble_selection,
    "mixture": mixture_selection,
    "all": all_tasks,
    "alone": targets_alone,
}


def select_tasks(
    problem: SelectionProblem, similarity: np.ndarray | None = None, verify: Verify | None = None, **options: Any
) -> Selection:
    """Run the problem's selection method and report the baselines' predicted losses with the result.

    Args:
        problem (`SelectionProblem`): the problem; its settings name the method.
        similarity (`np.ndarray` of shape `(T, T)`, *optional*): [`mean_cosines`] of the gradients, for the baseline.
        verify (`Callable`, *optional*): for the metric `"answers"`, see [`verified_selection`].
        options: further arguments of the method.

    Raises:
        `ConfigurationError`: for `"gradient_similarity"` without similarities, options that the method lacks, and
            `"answers"` without `verify`.
    """
    method = problem.settings.selection_method
    if problem.settings.selection_metric == "answers":
        selection = verified_selection(problem, verify, **options)
    elif method in _SEARCHES:
        check_options(_SEARCHES[method], options, f"method={method!r}")
        if method in ("forward", "backward"):
            selection = greedy_selection(problem, _SEARCHES[method])
        else:
            selection = _SEARCHES[method](problem, **options)
    else:
        size = options.pop("size", problem.settings.max_auxiliary)
        check_at_least("size", size, 0, optional=True)
        check_options(random_selection if method == "random" else similarity_selection, options, f"method={method!r}")
        if size is None:
            # As many as an unrestricted search selects.
            size = len(greedy_selection(problem, forward_selection).tasks) - int(problem.required.sum())
        if method == "random":
            selection = random_selection(problem, size, **options)
        elif similarity is None:
            raise ConfigurationError(
                "method='gradient_similarity' needs the gradients. Create the selector with DataSelector.from_store."
            )
        else:
            selection = similarity_selection(problem, size, similarity, **options)
    num_selected = len(set(selection.tasks) - set(problem.names_of(problem.required)))
    return replace(selection, baselines=predicted_baselines(problem, num_selected, similarity))
