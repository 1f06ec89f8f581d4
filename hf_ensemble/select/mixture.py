"""Sampling weights that minimize the predicted loss of targets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from scipy.optimize import minimize

from .._settings import check_at_least, check_number, checked_names
from .._text import counted
from ..errors import ConfigurationError
from ..estimate import SubsetEstimator
from ..estimate.mixtures import mixture_weights
from .baselines import predicted_baselines
from .choice import Choice, calibration_note, with_provenance
from .problem import SelectionProblem, Targets, target_weights
from .sampled_search import greedy_selection
from .searches import forward_selection
from .settings import SEARCH_ROWS, SelectionSettings

# Tasks with a smaller weight are dropped.
_MIN_WEIGHT = 1e-3


@dataclass(frozen=True)
class Mixture(Choice):
    """Sampling weights of the tasks.

    Args:
        targets (`dict[str, float]`): weight of each target task's loss.
        weights (`dict[str, float]`):
            Sampling weight of each task, as the trainers take them. The largest is 1; tasks that are left out are
            absent.
        probabilities (`dict[str, float]`):
            Share of the sampled rows that each task gets, as `datasets.interleave_datasets` takes them.
        predicted_loss (`float`): weighted predicted loss of the targets.
        subset (`list[str]`): the best subset of whole tasks, where the search started.
        subset_loss (`float`): its predicted loss.
        summary (`str`): one sentence.
        settings (`dict`): everything needed to repeat this mixture from the same features.
        baselines (`dict[str, float]`, *optional*):
            Predicted loss with all tasks, with the targets alone, and with the same number of random tasks.
    """

    format: ClassVar[str] = "hf_ensemble.mixture"
    made_by: ClassVar[str] = "mixture"

    targets: dict[str, float]
    weights: dict[str, float]
    probabilities: dict[str, float]
    predicted_loss: float
    subset: list[str]
    subset_loss: float
    baselines: dict[str, float] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of [`DataSelector.mixture`] that repeat the mixture."""
        return {"targets": self.targets, **super().arguments()}


def optimize_mixture(
    estimator: SubsetEstimator,
    targets: Targets,
    caps: float | Mapping[str, float] = 1.0,
    max_iterations: int = 100,
    search_rows: int | None = SEARCH_ROWS,
) -> Mixture:
    """Find the sampling weights with the least predicted loss of the targets.

    L-BFGS-B with the derivatives of [`SubsetEstimator.weighted_loss`] starts from the subset that [`forward_selection`]
    finds and from all tasks. The predicted loss is not convex in the weights: the result is the best of these local
    minima and of the subsets themselves.

    Args:
        estimator (`SubsetEstimator`): makes the predictions. Its own sampling weights are replaced, not multiplied.
        targets (`str`, `Sequence[str]` or `dict[str, float]`, *optional*):
            Task or tasks to optimize, with equal or given weights; `None` stands for all tasks.
        caps (`float` or `dict[str, float]`, *optional*, defaults to 1.0):
            Maximum weight of a row of any auxiliary task, or of the tasks named; 0 leaves a task out. Targets have 1.
        max_iterations (`int`, *optional*, defaults to 100): maximum number of L-BFGS-B iterations.
        search_rows (`int`, *optional*, defaults to 50,000):
            Training rows of all tasks together, and validation rows, that the search for the subset looks at, see
            [`DataSelector.select`]; the weights are found from all rows. `None` for all rows.

    Raises:
        `ConfigurationError`: for unknown tasks, target weights that are not positive, caps outside [0, 1], and an
            estimator of trainings that weigh the tasks' losses.
    """
    names, counts = estimator.task_names, estimator.counts
    check_at_least("max_iterations", max_iterations, 1)
    if estimator.task_loss_weighting != "tokens":
        raise ConfigurationError(
            "A mixture weighs tasks by how often their rows are drawn, and the predicted trainings weigh them by "
            f"task_loss_weighting={estimator.task_loss_weighting!r}. Use the default 'tokens' for mixtures."
        )
    targets = target_weights(targets, estimator)
    upper = _upper_bounds(caps, targets, names)
    goal = mixture_weights(targets, names)

    def predicted(weights: np.ndarray) -> float:
        return float(estimator.predict(weights / estimator.sampling_weights).loss[0] @ goal)

    def search(start: np.ndarray) -> np.ndarray:
        found = minimize(
            estimator.sensitivity(goal).to_weights,
            start,
            jac=True,
            method="L-BFGS-B",
            # The prediction is undefined without any row.
            bounds=[(min(limit, 1e-9), limit) for limit in upper],
            options={"maxiter": max_iterations},
        )
        kept = np.where(found.x < _MIN_WEIGHT, 0.0, found.x)
        return np.minimum(kept / kept.max(), upper) if kept.any() else start

    problem = SelectionProblem(estimator, targets, SelectionSettings(search_rows=search_rows))
    chosen = greedy_selection(problem, forward_selection).tasks
    subsets = [np.minimum(mixture_weights(tasks, names), upper) for tasks in (chosen, names)]
    subsets = [subset for subset in subsets if subset.any()]
    losses = [predicted(subset) for subset in subsets]
    first = int(np.argmin(losses))
    ends = [(predicted(weights), weights) for weights in map(search, subsets)]
    loss, weights = min([(losses[first], subsets[first]), *ends], key=lambda end: end[0])
    sampled = weights * counts / (weights @ counts)
    subset = [name for name, weight in zip(names, subsets[first]) if weight]
    num_auxiliary = sum(weight > 0 and name not in targets for name, weight in zip(names, weights))
    summary = (
        f"The predicted validation loss of {', '.join(targets)} is {loss:.4f} with these weights, and "
        f"{losses[first]:.4f} with the best subset, which has {counted(len(subset), 'task')}."
    )
    arguments = {
        "caps": caps if isinstance(caps, float | int) else dict(caps),
        "max_iterations": max_iterations,
        "search_rows": search_rows,
    }
    return Mixture(
        targets,
        {name: float(weight) for name, weight in zip(names, weights) if weight},
        {name: float(share) for name, share in zip(names, sampled) if share},
        loss,
        subset,
        losses[first],
        predicted_baselines(problem, num_auxiliary),
        summary=summary + calibration_note(estimator),
        settings=with_provenance(arguments, estimator),
    )


def _upper_bounds(caps: float | Mapping[str, float], targets: Mapping[str, float], names: Sequence[str]) -> np.ndarray:
    by_name = caps if isinstance(caps, Mapping) else dict.fromkeys(names, caps)
    checked_names("tasks in caps", by_name, names)
    for name, cap in by_name.items():
        check_number(f"The cap of {name!r}, relative to the largest weight,", cap, 0, 1)
    return np.array([1.0 if name in targets else float(by_name.get(name, 1.0)) for name in names])
