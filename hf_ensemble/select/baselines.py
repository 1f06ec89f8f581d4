"""What a choice for a target has to beat: simpler ways to choose tasks to train on beside it.

None of them looks at predicted scores to choose; the estimator only says what it predicts of their choice.
"""

from collections.abc import Callable, Sequence

import numpy as np
from sklearn.neural_network import MLPRegressor

from ..errors import ConfigurationError
from ..estimate import ObservedRun
from ..estimate.mixtures import mixture_weights
from ..store import FeatureTable
from .problem import SelectionProblem
from .searches import selection_of
from .selection import Selection
from .subsets import random_subsets

# Subsets among which a learned predictor looks for its best.
_NUM_CANDIDATES = 10_000


def all_tasks(problem: SelectionProblem) -> Selection:
    """Everything that may be in, whatever the budget."""
    return _chosen(problem, "all", problem.free, {})


def targets_alone(problem: SelectionProblem) -> Selection:
    """Only what has to be in; the targets where nothing has to."""
    required = problem.required.any()
    targets = mixture_weights(problem.targets, problem.names) > 0
    return _chosen(problem, "alone", problem.required if required else problem.free & targets, {})


def random_selection(problem: SelectionProblem, size: int, seed: int = 0) -> Selection:
    """`size` tasks drawn by chance."""
    free = np.flatnonzero(problem.free)
    drawn = np.zeros(len(problem.names), dtype=bool)
    drawn[free] = random_subsets(len(free), size, 1, seed)[0] > 0
    return _chosen(problem, "random", drawn, {}, {"size": size, "seed": seed})


def mean_cosines(train: FeatureTable, validation: FeatureTable) -> np.ndarray:
    """Mean cosine between the features of task k's training rows and of task j's validation rows, `(T, T)`."""

    def mean_directions(table: FeatureTable) -> np.ndarray:
        means = []
        for index in range(len(table.task_names)):
            rows = table.features[table.task == index]
            means.append((rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).mean(axis=0))
        return np.stack(means).astype(np.float64)

    return mean_directions(train) @ mean_directions(validation).T


def similarity_selection(
    problem: SelectionProblem, size: int, similarity: np.ndarray, method: str = "gradient_similarity"
) -> Selection:
    """The `size` tasks whose training rows are most like the targets' validation rows.

    With gradients as features of [`mean_cosines`] this is the choice of LESS (arXiv 2402.04333) at the level of tasks;
    with a model's hidden states, the usual choice by representation.

    Args:
        problem (`SelectionProblem`): targets, and what has to be in or out.
        size (`int`): tasks to take.
        similarity (`np.ndarray` of shape `(T, T)`): how much task k is like task j, in row k and column j.
        method (`str`, *optional*, defaults to `"gradient_similarity"`): name for the record.
    """
    return _nearest(problem, size, -similarity @ mixture_weights(problem.targets, problem.names), method)


def transport_selection(
    problem: SelectionProblem, size: int, train: FeatureTable, validation: FeatureTable
) -> Selection:
    """The `size` tasks whose rows, when there are more of them, bring the pool of all rows nearest to the targets'.

    The score of a task is the derivative of the optimal transport distance between the pool and the targets' validation
    rows by the share that a row has of the pool, averaged over the task's rows ("Get More for Less", arXiv 2405.02774).

    Args:
        problem (`SelectionProblem`): targets, and what has to be in or out.
        size (`int`): tasks to take.
        train, validation (`FeatureTable`): what is compared, by cosines; tasks in the problem's order.

    Raises:
        `ConfigurationError`: where the package POT is not installed.
    """
    try:
        import ot
    except ImportError as error:
        raise ConfigurationError(
            "Optimal transport needs the package POT: pip install POT, or hf_ensemble[transport]."
        ) from error
    goal = np.isin(validation.task, [problem.names.index(target) for target in problem.targets])
    # Of normalised rows the squared distance is twice one less the cosine.
    cost = ot.dist(train.features, validation.features[goal], metric="cosine").astype(np.float64)
    _, found = ot.emd(ot.unif(cost.shape[0]), ot.unif(cost.shape[1]), cost, log=True)
    potential = found["u"]
    # Shares sum to one, which leaves potentials free up to a constant: the mean of the other rows' is taken off.
    slopes = potential - (potential.sum() - potential) / (len(potential) - 1)
    return _nearest(problem, size, np.bincount(train.task, slopes) / np.bincount(train.task), "transport")


def learned_selection(problem: SelectionProblem, size: int, runs: Sequence[ObservedRun], seed: int = 0) -> Selection:
    """The `size` tasks that a network prefers which learned the targets' loss from true fine-tunings.

    A multilayer perceptron from the mixture to the loss, as in DaMo (arXiv 2510.19336); of many random subsets the best
    by its word is taken.

    Args:
        problem (`SelectionProblem`): targets, and what has to be in or out.
        size (`int`): tasks to take.
        runs (`Sequence[ObservedRun]`): the fine-tunings to learn from.
        seed (`int`, *optional*, defaults to 0): of the network and the subsets.
    """
    observed = np.array([mixture_weights(run.mixture, problem.names) for run in runs])
    losses = np.array([sum(weight * run.losses[name] for name, weight in problem.targets.items()) for run in runs])
    network = MLPRegressor(hidden_layer_sizes=(100, 100), alpha=1e-2, max_iter=5000, random_state=seed)
    network.fit(observed, (losses - losses.mean()) / (losses.std() or 1.0))
    free = np.flatnonzero(problem.free)
    candidates = np.tile(problem.required, (_NUM_CANDIDATES, 1))
    candidates[:, free] = random_subsets(len(free), size, _NUM_CANDIDATES, seed) > 0
    best = candidates[np.argmin(network.predict(candidates.astype(np.float64)))]
    return _chosen(problem, "learned", best & problem.free, {}, {"size": size, "seed": seed, "num_runs": len(runs)})


def predicted_baselines(
    problem: SelectionProblem, size: int, similarity: np.ndarray | None = None, num_random: int = 20
) -> dict[str, float]:
    """Predicted loss of the targets with each of the baselines that need nothing else; random ones on average."""
    found: dict[str, float] = {}

    def add(name: str, choose: Callable[[], Selection]) -> None:
        found[name] = choose().path[-1]["predicted_loss"]

    add("all", lambda: all_tasks(problem))
    add("alone", lambda: targets_alone(problem))
    if 0 < size < problem.free.sum():
        losses = [random_selection(problem, size, seed).path[-1]["predicted_loss"] for seed in range(num_random)]
        found["random"] = float(np.mean(losses))
        if similarity is not None:
            add("gradient_similarity", lambda: similarity_selection(problem, size, similarity))
    return found


def _nearest(problem: SelectionProblem, size: int, scores: np.ndarray, method: str) -> Selection:
    """The free tasks with the lowest scores `(T,)`."""
    free = sorted(np.flatnonzero(problem.free), key=lambda index: scores[index])
    chosen = np.zeros(len(problem.names), dtype=bool)
    chosen[free[:size]] = True
    return _chosen(
        problem, method, chosen, {problem.names[i]: float(scores[i]) for i in free}, {"size": size}, free[:size]
    )


def _chosen(
    problem: SelectionProblem,
    method: str,
    mask: np.ndarray,
    scores: dict[str, float],
    settings: dict[str, int] | None = None,
    order: Sequence[int] | None = None,
) -> Selection:
    order = np.flatnonzero(mask & ~problem.required) if order is None else order
    tasks = [*problem.named(problem.required), *(problem.names[i] for i in order)]
    scored = problem.score((mask | problem.required)[None])
    path = [{"added": ", ".join(tasks), **problem.step(scored, 0), "close_calls": []}]
    return selection_of(problem, method, tasks, scores, path, settings)
