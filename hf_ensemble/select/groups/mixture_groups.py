"""Groups of tasks that are served by the same mixture."""

import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.cluster import KMeans

from ..._text import counted
from ...estimate import ObservedRun, SubsetEstimator
from ..choice import calibration_note
from ..directions import unit_directions
from ..settings import GroupingSettings
from .adapters_at_hand import AdaptersAtHand
from .direct_search import add_helpers, merge_path
from .each_alone import TasksAlone
from .found_groups import FoundGroups
from .group_losses import GroupLosses, group_masks
from .mixture_search import MixturePool, MixtureSet, predicted_sets, search_mixtures
from .mixture_steps import MixtureSteps
from .optimism import CLOSE, CostPoint, SetComparison, cost_points

# Numbers of groups of the partitions that the search starts from.
_START_COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32)
# Up to this number of tasks, these partitions are those of merges, and up to the other one they get helpers.
_MAX_MERGED, _MAX_HELPED = 150, 40
# Maximum number of mixtures where it is not given: more adapters than this are rarely worth a forward each.
_MAX_MIXTURES = 8
# Up to this number of tasks, each may have an adapter of its own, which no search has to find; of more, as many as
# there may be mixtures.
_MAX_ALONE = 150
_MAX_ITERATIONS = 8


def mixture_groups(
    estimator: SubsetEstimator,
    plain: SubsetEstimator,
    rough: SubsetEstimator,
    group_losses: GroupLosses,
    settings: GroupingSettings,
    goal: np.ndarray,
    num_candidates: int,
    has_baseline: bool,
    trained: Mapping[str, ObservedRun],
    seed: int,
) -> FoundGroups:
    """Search for mixtures; the arguments are those of [`group_tasks`], and `goal` `(T,)` weighs the tasks' losses.

    `rough` and `group_losses` are what the search looks at. Where these are of a sample of rows, the losses of what it
    comes to are predicted from all rows. `plain` predicts the losses that are measured, without a scale of each task's
    outputs, where the others predict them with one.
    """
    size = len(estimator.task_names)
    most = settings.num_groups or settings.max_groups or min(_MAX_MIXTURES, size)
    at_hand = AdaptersAtHand.of(plain, trained, has_baseline, settings.group_initialization == "baseline")
    if plain is not estimator:
        at_hand = at_hand.on(estimator)
    budget = None if settings.compute_budget is None else max(settings.compute_budget - at_hand.cost, 0.0)
    counts = [count for count in _START_COUNTS if count <= min(most, size)]

    def search(
        estimator: SubsetEstimator, at_hand: AdaptersAtHand, starts: Sequence[np.ndarray]
    ) -> tuple[list[MixtureSet], list[MixtureSet]]:
        pool = MixturePool(estimator, goal, at_hand.losses, max(most - len(trained), 0))
        return search_mixtures(pool, MixtureSteps(estimator, goal, num_candidates, _MAX_ITERATIONS), budget, starts)

    clusters = _cluster_starts(estimator, counts, seed)
    starts = clusters
    if size <= _MAX_MERGED:
        starts = _merge_starts(rough, group_losses, counts, num_candidates)
    found = search(rough, at_hand if rough is estimator else at_hand.on(rough), starts)
    if rough is not estimator:
        found = tuple(predicted_sets(estimator, at_hand, sets, goal) for sets in found)

    @functools.cache
    def on_half(own: SubsetEstimator, hand: AdaptersAtHand) -> tuple[list[MixtureSet], list[MixtureSet]]:
        return search(own, hand, clusters)

    most_alone = settings.num_groups or settings.max_groups or (_MAX_ALONE if size <= _MAX_ALONE else most)
    most_alone -= len(trained)
    alone = TasksAlone(estimator, at_hand, goal)
    families = [
        (found[0], lambda own, hand: on_half(own, hand)[0]),
        (found[1], lambda own, hand: on_half(own, hand)[1]),
        (alone.some(most_alone, budget), lambda own, hand: TasksAlone(own, hand, goal).some(most_alone, budget)),
        (alone.every(most_alone, budget), None),
    ]
    sets, points = zip(*cost_points(estimator, rough, at_hand, goal, families))
    place = _chosen(estimator, at_hand, sets, points, goal, settings)
    is_alone = [any(one is own for own in families[-1][0]) for one in sets]
    shown = [own for number, own in enumerate(points) if number == place or is_alone[number]]
    return _found(estimator, at_hand, sets[place], points, points[place], goal, _front(points, shown))


def _found(
    estimator: SubsetEstimator,
    at_hand: AdaptersAtHand,
    best: MixtureSet,
    points: Sequence[CostPoint],
    point: CostPoint,
    goal: np.ndarray,
    front: Sequence[CostPoint],
) -> FoundGroups:
    curve: dict[str, float] = {}
    for one in points:
        curve[str(one.num_groups)] = min(one.predicted_loss, curve.get(str(one.num_groups), np.inf))
    names, labels, mixtures, lengths, baseline = _named(estimator, at_hand, best, goal)
    return FoundGroups(
        labels=labels,
        mixtures=mixtures / mixtures.max(axis=1, keepdims=True),
        curve=curve,
        cost=best.cost + at_hand.cost,
        summary=_summary(names, baseline, point, at_hand) + _scale_note(estimator) + calibration_note(estimator),
        names=names,
        lengths=lengths,
        baseline=baseline,
        cost_curve=[_as_values(one, at_hand.cost) for one in front],
        expected_loss=point.expected_loss,
    )


def _front(points: Sequence[CostPoint], shown: Sequence[CostPoint]) -> list[CostPoint]:
    """Points that no other one betters in both cost and expected loss, and those that are shown anyway, by cost."""
    found: list[CostPoint] = []
    for one in sorted(points, key=lambda own: (own.cost, own.expected_loss)):
        is_better = not found or one.expected_loss < min(own.expected_loss for own in found)
        if (is_better or one in shown) and one not in found:
            found.append(one)
    return found


def _as_values(point: CostPoint, cost: float) -> dict[str, float]:
    return {
        "cost": point.cost + cost,
        "num_groups": float(point.num_groups),
        "predicted_loss": point.predicted_loss,
        "optimism": point.optimism,
        "expected_loss": point.expected_loss,
        "difference": point.difference,
        "difference_low": point.difference - CLOSE * point.error,
        "difference_high": point.difference + CLOSE * point.error,
    }


def _summary(names: Sequence[str], baseline: int | None, point: CostPoint, at_hand: AdaptersAtHand) -> str:
    together = point.predicted_loss + point.optimism - point.difference
    if point.difference == 0 and len(names) == 1:
        return (
            f"One adapter for all tasks is enough, with a mean predicted loss of {together:.4f}: no mixtures within "
            "the budget are expected to lower it by more than chance."
        )
    adapters = counted(len(names), "adapter")
    if at_hand.has_baseline and baseline is None:
        adapters += " besides the one for all"
    subject = f"{adapters}, at {point.cost + at_hand.cost:.2f} times the training of one adapter for all,"
    expected = f"{'are' if len(names) > 1 else 'is'} expected to"
    if point.expected_loss == together:
        change = f"{expected} leave the mean loss at {together:.4f}"
    else:
        verb = "lower" if point.expected_loss < together else "raise"
        change = f"{expected} {verb} the mean loss from {together:.4f} to {point.expected_loss:.4f}"
    noise = "before allowing for the noise that the search fits"
    return f"{subject} {change} (predicted {point.predicted_loss:.4f}, {noise})."


def _scale_note(estimator: SubsetEstimator) -> str:
    return " Losses are those with a scale of each task's outputs." if estimator.is_scaled else ""


def _cluster_starts(estimator: SubsetEstimator, counts: Sequence[int], seed: int) -> list[np.ndarray]:
    """Clusters of the tasks' gradient directions, as row weights."""
    # Tasks of the same rows are one point.
    directions, num_points = unit_directions(estimator.task_gradients())
    found = []
    for count in counts:
        if count > num_points:
            break
        labels = KMeans(count, n_init=4, random_state=seed).fit_predict(directions)
        masks = np.stack([labels == label for label in np.unique(labels)])
        found.append(_as_row_weights(estimator, masks))
    return found


def _merge_starts(
    estimator: SubsetEstimator, group_losses: GroupLosses, counts: Sequence[int], num_candidates: int
) -> list[np.ndarray]:
    """Partitions of cheapest merges, of few tasks with helpers, as row weights; the search adds helpers by itself."""
    if not counts:
        return []
    starts, directions = [], estimator.task_gradients()
    for labels, _ in merge_path(group_losses, directions, num_candidates, min_groups=min(counts)):
        if labels.max() + 1 not in counts:
            continue
        trained = group_masks(labels)
        if len(labels) <= _MAX_HELPED:
            trained = add_helpers(group_losses, labels, trained, directions, num_candidates)
        starts.append(_as_row_weights(estimator, trained))
    return starts


def _as_row_weights(estimator: SubsetEstimator, masks: np.ndarray) -> np.ndarray:
    weights = masks * estimator.sampling_weights
    return weights / weights.max(axis=1, keepdims=True)


def _named(
    estimator: SubsetEstimator, at_hand: AdaptersAtHand, found: MixtureSet, goal: np.ndarray
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, int | None]:
    """Names, labels `(T,)`, mixtures in multiples of the sampling weights, lengths, and the group of the baseline.

    Groups that were trained come first and keep their names, whether or not they serve a task: other tasks may give
    them a weight. New ones follow under names that are not taken, the one with the largest gain first, then the one for
    all tasks if it serves a task. Gains are those over the adapters at hand, or else over one adapter for all.
    """
    together = at_hand.losses.min(axis=0) if len(at_hand) else estimator.predict(np.ones((1, len(goal)))).loss[0]
    gains = [float(goal @ np.where(found.serving == row, together - found.loss, 0.0)) for row in range(len(found))]
    order = np.argsort(-np.array(gains), kind="stable")
    number = len(at_hand.names)
    sources = [-1 - row for row in range(number)] + order.tolist()
    if at_hand.has_baseline:
        sources.append(-1 - number)
    free = (name for place in itertools.count(number) if (name := f"group_{place}") not in at_hand.names)
    named = [*at_hand.names, *(next(free) for _ in sources[number:])]
    used = [
        (name, source)
        for row, (name, source) in enumerate(zip(named, sources))
        if row < number or (found.serving == source).any()
    ]
    labels = np.zeros(len(goal), dtype=int)
    mixtures = np.zeros((len(used), len(goal)))
    lengths = np.full(len(used), estimator.length, dtype=np.float64)
    baseline = None
    for row, (_, source) in enumerate(used):
        labels[found.serving == source] = row
        if source >= 0:
            mixtures[row] = found.weights[source] / estimator.sampling_weights
            lengths[row] = found.lengths[source]
        else:
            mixtures[row] = at_hand.mixtures[-1 - source]
            if at_hand.has_baseline and -1 - source == number:
                baseline = row
    return [name for name, _ in used], labels, mixtures, lengths, baseline


def _chosen(
    estimator: SubsetEstimator,
    at_hand: AdaptersAtHand,
    sets: Sequence[MixtureSet],
    points: Sequence[CostPoint],
    goal: np.ndarray,
    settings: GroupingSettings,
) -> int:
    """The set with the least expected loss; without a budget or number, the cheapest that is not told from it."""
    losses = np.array([point.expected_loss + settings.group_cost * point.num_groups for point in points])
    best = int(np.argmin(losses))
    if settings.compute_budget is not None or settings.num_groups is not None:
        return best
    comparison = SetComparison(estimator, at_hand, goal)
    for index in range(best):
        if losses[index] - losses[best] <= CLOSE * comparison.between(sets[index], sets[best]):
            return index
    return best
