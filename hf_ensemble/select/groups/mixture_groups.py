"""Groups of tasks that are served by the same mixture."""

import numpy as np

from ...estimate import SubsetEstimator
from ..choice import calibration_note
from ..settings import GroupingSettings
from .direct_search import add_helpers, merge_path
from .found_groups import FoundGroups
from .group_losses import GroupLosses, group_masks
from .mixture_search import MAX_ALONE, MixturePool, MixtureSet, MixtureSteps, search_mixtures

# Numbers of groups of the partitions that the search starts from.
_START_COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32)
# Maximum number of mixtures where it is not given: more adapters than this are rarely worth a forward each.
_MAX_MIXTURES = 8
_MAX_ITERATIONS = 8
# Normal quantile: at 90 %, a difference within this many standard errors of zero may be due to chance.
_CLOSE = 1.645


def mixture_groups(
    estimator: SubsetEstimator,
    group_losses: GroupLosses,
    affinity: np.ndarray,
    settings: GroupingSettings,
    num_candidates: int,
    has_baseline: bool,
    seed: int,
) -> FoundGroups:
    """Search for mixtures; the arguments are those of [`group_tasks`]."""
    size = len(estimator.task_names)
    goal = np.full(size, 1.0 / size)
    most = settings.num_groups or settings.max_groups or min(_MAX_MIXTURES, size)
    everything = _baseline_loss(estimator, settings)
    pool = MixturePool(estimator, goal, everything if has_baseline else None, most)
    steps = MixtureSteps(estimator, goal, num_candidates, _MAX_ITERATIONS)
    budget = settings.compute_budget
    own = None if budget is None else budget - float(has_baseline)
    sets = search_mixtures(pool, steps, own, _starts(estimator, group_losses, most, num_candidates))
    if budget is None and settings.num_groups is None:
        best = _cheapest_good(estimator, sets, goal, settings, seed)
    else:
        best = min(sets, key=lambda one: float(goal @ one.loss) + settings.group_cost * len(one))
    curve: dict[str, float] = {}
    for one in sets:
        curve[str(len(one))] = min(float(goal @ one.loss), curve.get(str(len(one)), np.inf))
    labels, mixtures, baseline = _with_baseline(best, estimator)
    cost = best.cost + float(has_baseline)
    together = float(goal @ everything)
    cross_fitted = _cross_fitted_loss(_optima(estimator, best, settings), estimator, goal, seed)
    if not len(best):
        summary = (
            f"One adapter for all {size} tasks is enough, with a mean predicted loss of {together:.4f}: no mixtures "
            "within the budget are predicted to lower it."
        )
    else:
        summary = (
            f"{len(best)} mixture{'s' if len(best) > 1 else ''}, at {cost:.2f} times the training of one adapter for "
            f"all, lower the mean predicted loss from {together:.4f} to {float(goal @ best.loss):.4f} "
            f"({cross_fitted:.4f} without what choosing makes of noise)."
        )
    return FoundGroups(
        labels=labels,
        mixtures=mixtures / mixtures.max(axis=1, keepdims=True),
        curve=curve,
        cost=cost,
        summary=summary + calibration_note(estimator),
        baseline=baseline,
        cost_curve=[
            {
                "cost": one.cost + float(has_baseline),
                "num_groups": float(len(one)),
                "predicted_loss": float(goal @ one.loss),
            }
            for one in sets
        ],
        cross_fitted_loss=cross_fitted,
    )


def _starts(estimator: SubsetEstimator, group_losses: GroupLosses, most: int, num_candidates: int) -> list[np.ndarray]:
    """Partitions with helpers, as row weights; of many tasks without helpers, which the search adds by itself."""
    size, directions = len(estimator.task_names), estimator.task_gradients()
    sampling = estimator.sampling_weights / estimator.sampling_weights.max()
    counts = [count for count in _START_COUNTS if count <= min(most, size)]
    if not counts:
        return []
    starts = []
    for labels, _ in merge_path(group_losses, directions, num_candidates, min_groups=counts[0]):
        if labels.max() + 1 not in counts:
            continue
        trained = group_masks(labels)
        if size <= MAX_ALONE:
            trained = add_helpers(group_losses, labels, trained, directions, num_candidates)
        weights = trained * sampling
        starts.append(weights / weights.max(axis=1, keepdims=True))
    return starts


def _baseline_loss(estimator: SubsetEstimator, settings: GroupingSettings) -> np.ndarray:
    """Predicted loss of each task with the adapter for all tasks, `(T,)`."""
    if settings.group_initialization == "baseline":
        return estimator.start_loss()
    return estimator.predict(np.ones((1, len(estimator.task_names)))).loss[0]


def _with_baseline(found: MixtureSet, estimator: SubsetEstimator) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Labels `(T,)`, mixtures in multiples of the sampling weights, and the group that the baseline serves."""
    labels, mixtures = found.serving.copy(), found.weights / estimator.sampling_weights
    if not (labels == -1).any():
        return labels, mixtures, None
    labels[labels == -1] = len(mixtures)
    return labels, np.vstack([mixtures, np.ones((1, len(labels)))]), len(mixtures)


def _optima(estimator: SubsetEstimator, found: MixtureSet, settings: GroupingSettings) -> np.ndarray:
    """Optimum of each group's training, `(G, k)`."""
    _, mixtures, baseline = _with_baseline(found, estimator)
    optima = estimator.predict(mixtures).coefficients
    if baseline is not None and settings.group_initialization == "baseline":
        optima[baseline] = 0.0
    return optima


def _cheapest_good(
    estimator: SubsetEstimator, sets: list[MixtureSet], goal: np.ndarray, settings: GroupingSettings, seed: int
) -> MixtureSet:
    """The cheapest set that the validation rows do not tell from the best; the sets are sorted by cost."""
    optima = [_optima(estimator, one, settings) for one in sets]
    losses = [_cross_fitted_loss(own, estimator, goal, seed) for own in optima]
    best = int(np.argmin([loss + settings.group_cost * len(one) for loss, one in zip(losses, sets)]))
    for one, own in zip(sets[:best], optima):
        spread = _spread(estimator, (one, own), (sets[best], optima[best]), goal)
        if float(goal @ (one.loss - sets[best].loss)) <= _CLOSE * spread:
            return one
    return sets[best]


def _spread(
    estimator: SubsetEstimator,
    one: tuple[MixtureSet, np.ndarray],
    other: tuple[MixtureSet, np.ndarray],
    goal: np.ndarray,
) -> float:
    """Standard error, over the validation rows, of the difference between the losses of two sets with their optima."""
    serving = np.stack([found.serving % len(optima) for found, optima in (one, other)], axis=1)
    variance = 0.0
    for pair in np.unique(serving, axis=0):
        tasks = np.where((serving == pair).all(axis=1), goal, 0.0)
        variance += float(estimator.score_spread(one[1][pair[:1]], other[1][pair[1]], tasks)[0]) ** 2
    return variance**0.5


def _cross_fitted_loss(optima: np.ndarray, estimator: SubsetEstimator, goal: np.ndarray, seed: int) -> float:
    """Mean predicted loss when each task's optimum is chosen on one half of its rows and scored on the other."""
    halves = estimator.losses_by_half(optima, seed)
    tasks = np.arange(len(goal))
    scored = [goal @ other[own.argmin(axis=0), tasks] for own, other in (halves, halves[::-1])]
    return float(np.mean(scored))
