"""The ways to choose for a target, by name."""

import numpy as np

from ..errors import ConfigurationError
from ..estimate import SubsetEstimator
from .mixture import optimise_mixture
from .selection import Selection, check_target, forward_selection, random_ensemble_selection

SELECTION_METHODS = ("forward", "random_ensemble", "mixture")


def mixture_selection(
    estimator: SubsetEstimator, target: str, max_tasks: int | None = None, caps: float = 1.0
) -> Selection:
    """The target and its helpers with the sampling weights of [`optimise_mixture`], the most drawn first.

    Args:
        estimator (`SubsetEstimator`): predictions.
        target (`str`): the task to do well on.
        max_tasks (`int`, *optional*): auxiliary tasks to take at most: those that are drawn most are weighed anew.
        caps (`float`, *optional*, defaults to 1.0): largest weight of a row of an auxiliary task; a target's is 1.
    """
    names, column = estimator.task_names, check_target(estimator, target)
    mixture = optimise_mixture(estimator, target, caps)
    drawn = sorted(set(mixture.probabilities) - {target}, key=mixture.probabilities.get, reverse=True)
    if max_tasks is not None and len(drawn) > max_tasks:
        kept = dict.fromkeys(names, 0.0) | dict.fromkeys(drawn[:max_tasks], caps)
        mixture = optimise_mixture(estimator, target, kept)
        drawn = [task for task in drawn if task in mixture.weights]
    tasks = [target, *drawn]
    shared = dict(zip(names, estimator.sampling_weights))
    pairs = np.eye(len(names))
    pairs[:, column] = 1.0
    scores = {
        name: float(loss) for name, loss in zip(names, estimator.predict(pairs).loss[:, column]) if name != target
    }
    path = [{"added": ", ".join(mixture.subset), "predicted_loss": mixture.subset_loss}]
    path.append({"added": "weights", "predicted_loss": mixture.predicted_loss})
    return Selection(
        target,
        tasks,
        "mixture",
        scores,
        path,
        mixture.why,
        {**mixture.settings, "max_tasks": max_tasks},
        {task: mixture.weights.get(task, 0.0) / float(shared[task]) for task in tasks},
    )


def select_tasks(estimator: SubsetEstimator, target: str, method: str = "forward", **options) -> Selection:
    """Run one method by name. Raises `ConfigurationError` for another name."""
    methods = dict(zip(SELECTION_METHODS, (forward_selection, random_ensemble_selection, mixture_selection)))
    if method not in methods:
        raise ConfigurationError(f"method has to be one of {SELECTION_METHODS}, found {method!r}.")
    return methods[method](estimator, target, **options)
