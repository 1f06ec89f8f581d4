"""Groups of tasks that train together, one adapter each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ..._settings import check_at_least, check_flag, checked_mapping
from ...errors import ConfigurationError
from ...estimate import ObservedRun, SubsetEstimator
from ...estimate.mixtures import mixture_weights
from ..choice import Choice, with_provenance
from ..problem import Targets, target_weights
from ..settings import GroupingSettings
from .affinity import affinity_and_spread
from .group_losses import EstimatedGroups, GroupLosses
from .mixture_groups import mixture_groups
from .partition_groups import partition_groups

# Number of random partitions in the baseline; a single one where searches look at a sample of rows.
_NUM_RANDOM = 10
# Above this number of tasks, the affinity beside mixtures is predicted in few components.
_MANY, _FEW_COMPONENTS = 100, 50


@dataclass(frozen=True)
class Grouping(Choice):
    """Which tasks each adapter serves, and what it is trained on.

    Args:
        groups (`dict[str, list[str]]`): tasks that each group's adapter serves, by group name; each task is in one.
        mixtures (`dict[str, dict[str, float]]`):
            What each group's adapter is trained on: weight of a row of each task, in multiples of the task's sampling
            weight. The largest is 1; tasks that are left out are absent.
        method (`str`): `"mixtures"`, `"direct"`, `"spectral"`, `"semidefinite"` or `"coclustering"`.
        task_names (`list[str]`): order of the affinity's rows and columns.
        affinity (`list[list[float]]`): in nats, see [`predicted_affinity`].
        predicted_loss (`dict[str, float]`):
            Mean predicted validation loss over the tasks, by number of groups. With `"mixtures"` and `output_scales`,
            this and all other losses are those with a scale of each task's outputs, see [`group_tasks`].
        lengths (`dict[str, float]`, *optional*):
            Length of each group's training, in multiples of a whole one. That of the adapter for all tasks, where it
            serves a group, means nothing if the others go on from it.
        baseline_group (`str`, *optional*): the group whose adapter is the one for all tasks, which is trained anyway.
        cost (`float`):
            Training cost of all adapters, in multiples of one adapter for all: rows that are drawn. It includes the
            adapter for all tasks where that is trained too.
        cost_curve (`list[dict[str, float]]`, *optional*):
            With `"mixtures"`: the sets within the budget that no other one betters in both cost and expected loss, and
            each task alone. `cost`, `num_groups` (mixtures that are trained), `predicted_loss`, `optimism` (what
            searching has made of noise), `difference` from one adapter for all (predicted loss plus optimism, minus
            that adapter's; lower is better) with the ends of its 90 % interval over the validation rows,
            `difference_low` and `difference_high`, and `expected_loss`, where the difference is shrunk by its error.
        expected_loss (`float`, *optional*): with `"mixtures"`: of the set that was taken.
        baselines (`dict[str, float]`, *optional*):
            Mean predicted loss with one group, with one group per task, and with the same number of random groups.
        summary (`str`): one sentence.
        settings (`dict`): everything needed to repeat this grouping from the same features.
    """

    format: ClassVar[str] = "hf_ensemble.grouping"
    format_version: ClassVar[int] = 5
    made_by: ClassVar[str] = "group"

    groups: dict[str, list[str]]
    mixtures: dict[str, dict[str, float]]
    method: str
    task_names: list[str]
    affinity: list[list[float]]
    predicted_loss: dict[str, float]
    cost: float
    lengths: dict[str, float] = field(default_factory=dict)
    baseline_group: str | None = None
    cost_curve: list[dict[str, float]] = field(default_factory=list)
    expected_loss: float | None = None
    baselines: dict[str, float] = field(default_factory=dict)

    def group_of(self, task: str) -> str:
        """Name of the group that a task belongs to."""
        return next(name for name, tasks in self.groups.items() if task in tasks)

    def length_of(self, group: str) -> float:
        """Length of a group's training, in multiples of a whole one, which that of the adapter for all tasks is."""
        return 1.0 if group == self.baseline_group else self.lengths.get(group, 1.0)

    def trained_on(self, group: str) -> list[str]:
        """Tasks that a group's adapter is trained on, in the order of all tasks."""
        return [task for task in self.task_names if self.mixtures[group].get(task, 0.0) > 0]

    def helpers(self, group: str) -> list[str]:
        """Tasks that a group's adapter is trained on and that other groups serve."""
        return [task for task in self.trained_on(group) if task not in self.groups[group]]

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of [`DataSelector.group`] that repeat the grouping."""
        return {"method": self.method, **super().arguments()}


def predicted_losses(estimator: SubsetEstimator, grouping: Grouping) -> np.ndarray:
    """Predicted loss of every task under each group's adapter, `(G, T)`.

    Args:
        estimator (`SubsetEstimator`): predicts trainings from where those of the groups begin.
        grouping (`Grouping`): a grouping of its tasks.

    Raises:
        `EstimationError`: for an estimator that does not know the length of one of the groups.
    """
    mixtures = [mixture_weights(mixture, estimator.task_names) for mixture in grouping.mixtures.values()]
    lengths = np.array([grouping.lengths.get(name, estimator.length) for name in grouping.mixtures])
    losses = estimator.predict(np.array(mixtures), lengths=lengths).loss
    if grouping.settings["group_initialization"] == "baseline" and grouping.baseline_group is not None:
        start = np.zeros((1, estimator.reduction.components.shape[1]))
        losses[list(grouping.groups).index(grouping.baseline_group)] = estimator.loss_at(start)[0]
    return losses


def partition_loss(estimator: SubsetEstimator, groups: Sequence[Sequence[str]]) -> float:
    """Mean over the tasks of the predicted loss under the task's own group."""
    prediction = estimator.predict_subsets(groups)
    index = {name: i for i, name in enumerate(estimator.task_names)}
    return float(np.mean([prediction.loss[row, index[task]] for row, group in enumerate(groups) for task in group]))


def group_tasks(
    estimator: SubsetEstimator,
    settings: GroupingSettings | None = None,
    num_candidates: int = 10,
    subset_size: int | None = None,
    has_baseline: bool = True,
    trained: Mapping[str, ObservedRun | Mapping[str, Any]] | None = None,
    targets: Targets = None,
    seed: int = 0,
    output_scales: bool = True,
) -> Grouping:
    """Choose what each of several adapters is trained on, and which of them serves each task.

    `"mixtures"` searches for weighted mixtures of all tasks: each task is served by the one that is best for it, and a
    task may be trained on by many. Where the estimator knows several lengths of trainings, each mixture has its own.
    The search keeps within `compute_budget` and takes the set with the least expected loss, or without a budget the
    cheapest set that cannot be told from it, by the validation rows.

    The other methods partition the tasks. `"direct"` minimizes the predicted loss of the partition itself: it merges
    the groups whose merge costs least, then moves and swaps tasks, from the merged partition and from the spectral
    clusters. The others partition the affinity matrix; `"coclustering"` also trains groups on tasks of others.

    Without a number of groups, partitions into 1, 2, ... up to `max_groups` groups are tried and the one with the least
    predicted loss and group cost is kept; the semidefinite program also proposes a number of its own through its trace
    penalty. With more than 30 tasks, `"direct"` tries every number and the other methods try some, logarithmically
    spaced.

    Args:
        estimator (`SubsetEstimator`):
            Makes the predictions; with `group_initialization="baseline"`, from gradients at the adapter for all tasks.
        settings (`GroupingSettings`, *optional*): method, number of groups, budget, overlap.
        num_candidates (`int`, *optional*, defaults to 10):
            Number of groups, or of tasks in other groups, that `"direct"` tries each group or task with. It is
            exhaustive from the number of tasks on. With `"mixtures"`, number of tasks that a step adds at most.
        subset_size (`int`, *optional*): see [`predicted_affinity`].
        has_baseline (`bool`, *optional*, defaults to `True`):
            Whether an adapter for all tasks is trained anyway. Its cost counts, and with `"mixtures"` it serves the
            tasks that do best with it.
        trained (`dict[str, ObservedRun]`, *optional*):
            With `"mixtures"`: adapters of groups that are trained already, by the group's name, with their measured
            losses. They cost what they have cost and serve the tasks that do best with them.
        targets (`str`, `Sequence[str]` or `dict[str, float]`, *optional*):
            With `"mixtures"`: tasks whose loss counts, or the weight of each in the mean. All alike by default.
        seed (`int`, *optional*, defaults to 0): seed of the affinity's subsets and of the clustering.
        output_scales (`bool`, *optional*, defaults to `True`):
            With `"mixtures"`: whether the adapters' outputs get a scale for each task, the inverse of a temperature, as
            cross-validated weights have one. All losses are then those that are left with it: an adapter that is right
            and too sure of itself is valued by what it knows. It is known for answers of one token.

    Raises:
        `ConfigurationError`:
            For more groups than tasks, values out of range, and `trained` with an estimator of several lengths.
    """
    check_at_least("num_candidates", num_candidates, 1)
    check_at_least("subset_size", subset_size, 1, optional=True)
    check_at_least("seed", seed, 0)
    check_flag("has_baseline", has_baseline)
    check_flag("output_scales", output_scales)
    settings = settings or GroupingSettings()
    names = estimator.task_names
    settings.check_tasks(len(names))
    runs = _as_runs({} if trained is None else trained, settings)
    if targets is not None and settings.grouping_method != "mixtures":
        raise ConfigurationError(
            f"targets={targets!r:.60} weigh the losses of mixtures; grouping_method={settings.grouping_method!r} takes "
            "the mean over all tasks. Set grouping_method='mixtures', or leave them out."
        )
    weights = target_weights(targets, estimator)
    if settings.group_initialization == "baseline" and not has_baseline:
        raise ConfigurationError(
            "group_initialization='baseline' begins at the adapter for all tasks, and none is trained. Set "
            "train_baseline=True, or group_initialization='fresh'."
        )
    if runs and len(estimator.lengths) > 1:
        raise ConfigurationError(
            f"trained={list(runs)} are adapters of trainings of length {estimator.length:g}, and this estimator knows "
            f"others, {list(estimator.lengths[1:])}, too. Leave other_lengths out."
        )
    plain = estimator
    if settings.grouping_method == "mixtures" and output_scales and plain.can_be_scaled:
        estimator = plain.scaled()
    rough = estimator if settings.search_rows is None else estimator.sampled(settings.search_rows)
    losses = GroupLosses(EstimatedGroups(estimator))
    searched = losses if rough is estimator else GroupLosses(EstimatedGroups(rough))
    affinity, spread = _affinity(rough, settings, subset_size, seed)
    if settings.grouping_method == "mixtures":
        goal = np.array([weights.get(name, 0.0) for name in names])
        goal /= goal.sum()
        found = mixture_groups(
            estimator, plain, rough, searched, settings, goal, num_candidates, has_baseline, runs, seed
        )
    else:
        scaled = affinity / spread[:, None]
        found = partition_groups(estimator, losses, searched, scaled, settings, num_candidates, has_baseline, seed)
    options = {
        "num_candidates": num_candidates,
        "subset_size": subset_size,
        "has_baseline": has_baseline,
        "trained": {name: run.as_dict() for name, run in runs.items()},
        "targets": None if targets is None else weights,
        "seed": seed,
        "output_scales": output_scales,
    }
    return Grouping(
        groups=_by_name(found.names, names, found.labels),
        mixtures={
            group: {name: float(weight) for name, weight in zip(names, weights) if weight}
            for group, weights in zip(found.names, found.mixtures)
        },
        method=settings.grouping_method,
        task_names=list(names),
        affinity=affinity.tolist(),
        predicted_loss=found.curve,
        cost=found.cost,
        lengths=dict(zip(found.names, found.lengths.tolist())),
        baseline_group=None if found.baseline is None else found.names[found.baseline],
        cost_curve=found.cost_curve,
        expected_loss=found.expected_loss,
        baselines=_baselines(losses, len(names), len(found.mixtures), seed, _NUM_RANDOM if rough is estimator else 1),
        summary=found.summary,
        settings=with_provenance({**settings.group_arguments(), **options}, plain),
    )


def _baselines(losses: GroupLosses, num_tasks: int, num_groups: int, seed: int, num_random: int) -> dict[str, float]:
    """Mean losses of uninformed partitions; the mean over several random ones."""
    generator = np.random.default_rng(seed)
    # Sizes differ by one at most.
    random = [generator.permutation(np.arange(num_tasks) % num_groups) for _ in range(num_random)]
    return {
        "one group": losses.of_partition(np.zeros(num_tasks, dtype=int)) / num_tasks,
        "one per task": losses.of_partition(np.arange(num_tasks)) / num_tasks,
        "random": float(np.mean([losses.of_partition(labels) for labels in random])) / num_tasks,
    }


def _by_name(groups: Sequence[str], names: Sequence[str], labels: np.ndarray) -> dict[str, list[str]]:
    return {group: [name for name, own in zip(names, labels) if own == row] for row, group in enumerate(groups)}


def _as_runs(
    trained: Mapping[str, ObservedRun | Mapping[str, Any]], settings: GroupingSettings
) -> dict[str, ObservedRun]:
    known = checked_mapping("trained", trained)
    if known and settings.grouping_method != "mixtures":
        raise ConfigurationError(
            f"trained={list(known)} are mixtures that exist already; grouping_method={settings.grouping_method!r} "
            "partitions the tasks anew. Set grouping_method='mixtures', or leave it out."
        )
    return {name: _as_run(name, run) for name, run in known.items()}


def _as_run(name: str, run: ObservedRun | Mapping[str, Any]) -> ObservedRun:
    if isinstance(run, ObservedRun):
        return run
    if not isinstance(run, Mapping) or set(run) - {"captured_losses"} != {"mixture", "losses"}:
        raise ConfigurationError(
            f"Expected trained[{name!r}] as an ObservedRun, or a dict of its mixture and losses, found {run!r:.80}."
        )
    return ObservedRun(**run)


def _affinity(
    estimator: SubsetEstimator, settings: GroupingSettings, subset_size: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """See [`affinity_and_spread`]; mixtures are not searched for by it, so that few components do."""
    if len(estimator.task_names) == 1:
        return np.zeros((1, 1)), np.ones(1)
    if settings.grouping_method == "mixtures" and len(estimator.task_names) > _MANY:
        estimator = estimator.truncated(_FEW_COMPONENTS)
    return affinity_and_spread(estimator, settings.affinity_subsets, subset_size, seed)
