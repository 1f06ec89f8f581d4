"""Baselines for task selection.

They select without predicted scores; the estimator only predicts the outcome of what they selected.
"""

from collections.abc import Sequence

import numpy as np
from sklearn.neural_network import MLPRegressor

from ..errors import ConfigurationError
from ..estimate import ObservedRun
from ..estimate.mixtures import mixture_weights
from ..store import FeatureTable, row_blocks
from .problem import SelectionProblem
from .searches import make_selection
from .selection import Selection
from .subsets import random_subsets

# Random subsets that a learned predictor ranks.
_NUM_CANDIDATES = 10_000
# Random subsets that are averaged where searches look at a sample of rows.
_FEW_RANDOM = 4


def all_tasks(problem: SelectionProblem) -> Selection:
    """All tasks that are not excluded, regardless of the budget."""
    return _chosen(problem, "all", problem.optional, {})


def targets_alone(problem: SelectionProblem) -> Selection:
    """The required tasks alone, or the targets where no task is required.

    Raises:
        `ConfigurationError`: where the targets are excluded, and no task is required.
    """
    alone = _alone(problem)
    if not alone.any():
        raise ConfigurationError(
            f"method='alone' trains on the targets {list(problem.targets)}, which are excluded. Do not exclude them."
        )
    return _chosen(problem, "alone", alone, {})


def random_selection(problem: SelectionProblem, size: int, seed: int = 0) -> Selection:
    """`size` random tasks."""
    return _chosen(problem, "random", _drawn(problem, size, seed), {}, {"size": size, "seed": seed})


def mean_cosines(train: FeatureTable, validation: FeatureTable) -> np.ndarray:
    """Mean cosine similarity between the features of task k's training rows and task j's validation rows, `(T, T)`."""

    def mean_directions(table: FeatureTable) -> np.ndarray:
        sums = np.zeros((len(table.task_names), table.features.shape[1]))
        for part, block in row_blocks(table.features):
            directions = block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-12)
            for index in np.unique(table.task[part]):
                sums[index] += directions[table.task[part] == index].sum(axis=0, dtype=np.float64)
        return sums / np.bincount(table.task, minlength=len(sums))[:, None]

    return mean_directions(train) @ mean_directions(validation).T


def similarity_selection(
    problem: SelectionProblem, size: int, similarity: np.ndarray, method: str = "gradient_similarity"
) -> Selection:
    """The `size` tasks whose training rows are most similar to the targets' validation rows.

    With gradients as features of [`mean_cosines`] this is LESS (arXiv 2402.04333) at the level of tasks; with hidden
    states, the usual selection by representation similarity.

    Args:
        problem (`SelectionProblem`): the problem.
        size (`int`): number of tasks to select.
        similarity (`np.ndarray` of shape `(T, T)`): similarity of task k (row) to task j (column).
        method (`str`, *optional*, defaults to `"gradient_similarity"`): recorded name of the method.
    """
    return _nearest(problem, size, -similarity @ mixture_weights(problem.targets, problem.names), method)


def transport_selection(
    problem: SelectionProblem, size: int, train: FeatureTable, validation: FeatureTable
) -> Selection:
    """The `size` tasks that most reduce the optimal transport distance from the pool of all rows to the targets' rows.

    A task's score is the derivative of the distance to the targets' validation rows with respect to a row's share of
    the pool, averaged over the task's rows ("Get More for Less", arXiv 2405.02774).

    Args:
        problem (`SelectionProblem`): the problem.
        size (`int`): number of tasks to select.
        train, validation (`FeatureTable`): features to compare by cosine; tasks in the problem's order.

    Raises:
        `ConfigurationError`: if the package POT is not installed.
    """
    try:
        import ot
    except ImportError as error:
        raise ConfigurationError(
            "Optimal transport needs the package POT. Run pip install POT, or install hf_ensemble[transport]."
        ) from error
    goal = np.isin(validation.task, [problem.names.index(target) for target in problem.targets])
    # The squared distance of normalized rows is 2 (1 - cosine).
    cost = ot.dist(np.asarray(train.features), validation.features[goal], metric="cosine").astype(np.float64)
    _, found = ot.emd(ot.unif(cost.shape[0]), ot.unif(cost.shape[1]), cost, log=True)
    potential = found["u"]
    # Shares sum to one, so potentials are defined up to a constant: the mean over the other rows is subtracted.
    slopes = potential - (potential.sum() - potential) / (len(potential) - 1)
    return _nearest(problem, size, np.bincount(train.task, slopes) / np.bincount(train.task), "transport")


def learned_selection(problem: SelectionProblem, size: int, runs: Sequence[ObservedRun], seed: int = 0) -> Selection:
    """The `size` tasks preferred by a network that was trained on the losses of real fine-tunings.

    A multilayer perceptron maps the mixture to the targets' loss, as in DaMo (arXiv 2510.19336); the best of many
    random subsets by its prediction is selected.

    Args:
        problem (`SelectionProblem`): the problem.
        size (`int`): number of tasks to select.
        runs (`Sequence[ObservedRun]`): fine-tunings to learn from.
        seed (`int`, *optional*, defaults to 0): seed of the network and the subsets.
    """
    observed = np.array([mixture_weights(run.mixture, problem.names) for run in runs])
    losses = np.array([sum(weight * run.losses[name] for name, weight in problem.targets.items()) for run in runs])
    network = MLPRegressor(hidden_layer_sizes=(100, 100), alpha=1e-2, max_iter=5000, random_state=seed)
    network.fit(observed, (losses - losses.mean()) / (losses.std() or 1.0))
    optional = np.flatnonzero(problem.optional)
    candidates = np.tile(problem.required, (_NUM_CANDIDATES, 1))
    candidates[:, optional] = random_subsets(len(optional), size, _NUM_CANDIDATES, seed) > 0
    best = candidates[np.argmin(network.predict(candidates.astype(np.float64)))]
    return _chosen(problem, "learned", best & problem.optional, {}, {"size": size, "seed": seed, "num_runs": len(runs)})


def predicted_baselines(
    problem: SelectionProblem, size: int, similarity: np.ndarray | None = None, num_random: int = 20
) -> dict[str, float]:
    """Predicted loss of the targets with each baseline that needs no further data; random ones are averaged."""
    optional = np.flatnonzero(problem.optional)
    masks = {"all": problem.optional, "alone": _alone(problem)}
    if not masks["alone"].any():
        del masks["alone"]
    if 0 < size < len(optional):
        num_random = min(num_random, _FEW_RANDOM) if problem.has_many_rows else num_random
        masks |= {f"random {seed}": _drawn(problem, size, seed) for seed in range(num_random)}
        if similarity is not None:
            alike = _ranked(problem, -similarity @ mixture_weights(problem.targets, problem.names))[:size]
            masks["gradient_similarity"] = np.isin(np.arange(len(problem.names)), alike)
    losses = dict(zip(masks, problem.losses(np.stack(list(masks.values())) | problem.required).tolist()))
    found = {name: loss for name, loss in losses.items() if not name.startswith("random ")}
    random = [loss for name, loss in losses.items() if name not in found]
    return found if not random else {**found, "random": float(np.mean(random))}


def _alone(problem: SelectionProblem) -> np.ndarray:
    targets = mixture_weights(problem.targets, problem.names) > 0
    return problem.required if problem.required.any() else problem.optional & targets


def _drawn(problem: SelectionProblem, size: int, seed: int) -> np.ndarray:
    """`size` random tasks, as a mask `(T,)`."""
    optional = np.flatnonzero(problem.optional)
    drawn = np.zeros(len(problem.names), dtype=bool)
    drawn[optional] = random_subsets(len(optional), size, 1, seed)[0] > 0
    return drawn


def _ranked(problem: SelectionProblem, scores: np.ndarray) -> list[int]:
    """The optional tasks, lowest scores `(T,)` first."""
    return sorted(np.flatnonzero(problem.optional), key=lambda index: scores[index])


def _nearest(problem: SelectionProblem, size: int, scores: np.ndarray, method: str) -> Selection:
    """The optional tasks with the lowest scores `(T,)`."""
    ranked = _ranked(problem, scores)
    chosen = np.zeros(len(problem.names), dtype=bool)
    chosen[ranked[:size]] = True
    return _chosen(
        problem, method, chosen, {problem.names[i]: float(scores[i]) for i in ranked}, {"size": size}, ranked[:size]
    )


def _chosen(
    problem: SelectionProblem,
    method: str,
    mask: np.ndarray,
    scores: dict[str, float],
    options: dict[str, int] | None = None,
    order: Sequence[int] | None = None,
) -> Selection:
    order = np.flatnonzero(mask & ~problem.required) if order is None else order
    tasks = [*problem.names_of(problem.required), *(problem.names[i] for i in order)]
    scored = problem.score((mask | problem.required)[None])
    path = [{"added": ", ".join(tasks), **problem.path_entry(scored, 0), "close_calls": []}]
    return make_selection(problem, method, tasks, scores, path, options)
