"""In which shares to train on the tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

from .._files import read_json, write_json
from ..errors import ConfigurationError
from ..estimate import SubsetEstimator
from ..estimate.mixtures import mixture_weights
from .baselines import predicted_baselines
from .problem import SelectionProblem, Targets, target_weights
from .provenance import caution, settings_of
from .searches import forward_selection

# Rows of a task with less are not worth drawing.
_LEAST_WEIGHT = 1e-3


@dataclass(frozen=True)
class Mixture:
    """Sampling weights for the tasks, and why.

    Args:
        targets (`dict[str, float]`): what to do well on: weight of each task's loss.
        weights (`dict[str, float]`):
            How often training draws a row of each task; the largest is 1, and tasks that are left out are not named.
            They are what trainers take as sampling weights.
        probabilities (`dict[str, float]`):
            Share of the drawn rows that each task has; what `datasets.interleave_datasets` takes.
        predicted_loss (`float`): of the targets, weighted.
        subset (`list[str]`): the best subset of whole tasks that was found, where the search began.
        subset_loss (`float`): its predicted loss.
        why (`str`): one sentence.
        settings (`dict`): everything needed to make this mixture again from the same features.
        baselines (`dict[str, float]`, *optional*):
            Predicted loss with all tasks, with the targets alone, and with as many tasks at random.
    """

    targets: dict[str, float]
    weights: dict[str, float]
    probabilities: dict[str, float]
    predicted_loss: float
    subset: list[str]
    subset_loss: float
    why: str
    settings: dict
    baselines: dict[str, float] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Mixture":
        return cls(**read_json(Path(path)))


def optimise_mixture(
    estimator: SubsetEstimator,
    targets: Targets,
    caps: float | Mapping[str, float] = 1.0,
    max_iterations: int = 100,
) -> Mixture:
    """The sampling weights with the least predicted loss of the targets.

    By L-BFGS-B with the derivatives of [`SubsetEstimator.weighted_loss`], from the subset that [`forward_selection`]
    finds for the targets and from all tasks. The predicted loss is not convex in the weights: the result is the best of
    these local minima and of the subsets themselves.

    Args:
        estimator (`SubsetEstimator`): predictions. Its own sampling weights are replaced, not multiplied.
        targets (`str`, `Sequence[str]` or `dict[str, float]`, *optional*):
            What to do well on; several count alike without weights, `None` stands for all tasks.
        caps (`float` or `dict[str, float]`, *optional*, defaults to 1.0):
            Largest weight of a row of any auxiliary task, or of those that are named; 0 leaves a task out. Targets
            have 1.
        max_iterations (`int`, *optional*, defaults to 100): of L-BFGS-B.

    Raises:
        `ConfigurationError`: for unknown tasks, target weights that are not positive, and caps outside of 0 to 1.
    """
    names, counts = estimator.task_names, estimator.counts
    targets = target_weights(targets, estimator)
    upper = _upper_bounds(caps, targets, names)
    goal = mixture_weights(targets, names)

    def predicted(weights: np.ndarray) -> float:
        return float(estimator.predict(weights / estimator.sampling_weights).loss[0] @ goal)

    def search(start: np.ndarray) -> np.ndarray:
        found = minimize(
            lambda weights: estimator.weighted_loss(weights, goal),
            start,
            jac=True,
            method="L-BFGS-B",
            # Without any row there is nothing to predict.
            bounds=[(min(limit, 1e-9), limit) for limit in upper],
            options={"maxiter": max_iterations},
        )
        kept = np.where(found.x < _LEAST_WEIGHT, 0.0, found.x)
        return np.minimum(kept / kept.max(), upper) if kept.any() else start

    problem = SelectionProblem(estimator, targets)
    chosen = forward_selection(problem).tasks
    subsets = [np.minimum(mixture_weights(tasks, names), upper) for tasks in (chosen, names)]
    subsets = [subset for subset in subsets if subset.any()]
    losses = [predicted(subset) for subset in subsets]
    first = int(np.argmin(losses))
    ends = [(predicted(weights), weights) for weights in map(search, subsets)]
    loss, weights = min([(losses[first], subsets[first]), *ends], key=lambda end: end[0])
    drawn = weights * counts / (weights @ counts)
    subset = [name for name, weight in zip(names, subsets[first]) if weight]
    helpers = sum(weight > 0 and name not in targets for name, weight in zip(names, weights))
    why = (
        f"The predicted validation loss of {', '.join(targets)} is {loss:.4f} with these weights, and "
        f"{losses[first]:.4f} with the best subset, of {len(subset)} tasks."
    )
    return Mixture(
        targets,
        {name: float(weight) for name, weight in zip(names, weights) if weight},
        {name: float(share) for name, share in zip(names, drawn) if share},
        loss,
        subset,
        losses[first],
        why + caution(estimator),
        settings_of(
            estimator, {"caps": caps if isinstance(caps, float | int) else dict(caps), "max_iterations": max_iterations}
        ),
        predicted_baselines(problem, helpers),
    )


def _upper_bounds(caps: float | Mapping[str, float], targets: Mapping[str, float], names: Sequence[str]) -> np.ndarray:
    named = dict(caps) if isinstance(caps, Mapping) else dict.fromkeys(names, caps)
    unknown = sorted(set(named) - set(names))
    if unknown:
        raise ConfigurationError(f"The caps name unknown tasks {unknown}; the tasks are {list(names)}.")
    if not all(0 <= cap <= 1 for cap in named.values()):
        raise ConfigurationError(f"A cap has to be from 0 to 1, relative to the largest weight; found {caps}.")
    return np.array([1.0 if name in targets else float(named.get(name, 1.0)) for name in names])
