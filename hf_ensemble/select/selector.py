"""`DataSelector`: choices made from a gradient store."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .._settings import check_options
from ..errors import ConfigurationError
from ..estimate import ObservedRun, SubsetEstimator
from ..logging import get_logger
from ..store import GradientStore
from .baselines import mean_cosines
from .choice import Choice
from .clusters import (
    cluster_counts,
    runs_by_cluster,
    split_into_clusters,
    task_of,
    values_by_cluster,
    values_by_task,
)
from .examples import ExampleScores, score_examples
from .groups.affinity import predicted_affinity
from .groups.grouping import Grouping, group_tasks
from .methods import select_tasks
from .mixture import Mixture, optimize_mixture
from .problem import SelectionProblem, Targets
from .selection import Selection
from .settings import SEARCH_ROWS, GroupingSettings, SelectionSettings
from .verified_search import Verify

logger = get_logger(__name__)

AnyChoice = TypeVar("AnyChoice", bound=Choice)


class DataSelector:
    """Selects, weights, groups and scores training data by predicted fine-tuning outcomes.

    Args:
        estimator (`SubsetEstimator`): makes the predictions.
        similarity (`np.ndarray` of shape `(T, T)`, *optional*):
            Mean cosine similarity between the gradients of task k's training rows and task j's validation rows, for the
            `"gradient_similarity"` baseline.

    Example:

    ```python
    >>> selector = DataSelector.from_store("out/gradients")  # doctest: +SKIP
    >>> selector.select(target="sst2").auxiliary  # doctest: +SKIP
    ['mr', 'cr', 'tweet_sentiment']
    >>> selector.group(num_groups=4).groups  # doctest: +SKIP
    ```
    """

    def __init__(self, estimator: SubsetEstimator, similarity: np.ndarray | None = None):
        self.estimator = estimator
        self.similarity = similarity

    @classmethod
    def from_store(
        cls,
        store: str | Path | GradientStore,
        tasks: Sequence[str] | None = None,
        num_components: int = 400,
        observed_runs: Sequence[ObservedRun] = (),
        sampling_weights: Mapping[str, float] | None = None,
        clusters: Mapping[str, int] | None = None,
        task_loss_weighting: str = "tokens",
        length: float = 1.0,
        device: str | None = None,
        other_lengths: Sequence[float] = (),
    ) -> "DataSelector":
        """Create a selector from captured gradients.

        Args:
            store (`str`, `Path` or `GradientStore`): the store or its directory.
            tasks (`Sequence[str]`, *optional*): tasks to use. All tasks of the store by default.
            num_components, observed_runs, sampling_weights:
                See [`SubsetEstimator`]. Without observed runs, the training recipe in the store is replayed.
            clusters (`dict[str, int]`, *optional*):
                Number of clusters to split a task's training rows into. Each is a task `TASK/0`, `TASK/1`, ... that is
                selected or left out by itself, see [`split_into_clusters`] and [`left_out`].
            task_loss_weighting (`str`, *optional*, defaults to `"tokens"`): see [`SubsetEstimator`].
            length (`float`, *optional*, defaults to 1.0):
                Length of the trainings to choose for, in multiples of the one whose recipe is in the store.
            device (`str`, *optional*): device that predictions are made on, such as `"cuda"`. The CPU by default.
            other_lengths (`Sequence[float]`, *optional*):
                Further lengths that `"mixtures"` chooses among for each group's training. They need a recipe in the
                store; without one they are left out, with a warning.

        Raises:
            `StoreError`: for an incomplete store.
            `ConfigurationError`: for clusters of unknown tasks, more clusters than rows, clusters beside a weighting of
                the tasks' losses, and a device that is not there, or has no float64.
        """
        store = store if isinstance(store, GradientStore) else GradientStore(store)
        names = store.task_names if tasks is None else tasks
        train = store.table("train", names)
        recipe = store.recipe
        if recipe is not None:
            # Fewer rows take fewer steps.
            sizes = store.task_sizes("train")
            every = store.num_rows("train") if sizes is None else int(sizes.sum())
            recipe = recipe.shortened(int(train.sizes.sum()) / every)
        elif other_lengths:
            logger.warning(
                "%s was captured without a recipe, so that no lengths can be chosen among: every training has the "
                "length %g.",
                store.folder,
                length,
            )
            other_lengths = ()
        validation = store.table("validation", names)
        if clusters and task_loss_weighting != "tokens":
            raise ConfigurationError(
                f"With task_loss_weighting={task_loss_weighting!r} a task counts as much without a part of its rows, "
                "so that parts cannot be chosen one by one. Leave clusters out."
            )
        if clusters:
            train, validation = split_into_clusters(train, validation, clusters)
            observed_runs = runs_by_cluster(observed_runs, train.task_names)
            sampling_weights = values_by_cluster(sampling_weights or {}, train.task_names)
        estimator = SubsetEstimator(
            train,
            validation,
            num_components,
            observed_runs,
            sampling_weights,
            recipe,
            device,
            task_loss_weighting=task_loss_weighting,
            length=length,
            other_lengths=other_lengths,
        )
        return cls(estimator, mean_cosines(train, validation))

    @classmethod
    def for_choice(cls, store: str | Path | GradientStore, choice: Choice) -> "DataSelector":
        """Recreate the selector that made a saved choice, from the same store.

        Raises:
            `StoreMismatchError`: for a store other than the choice's; the differences are named.
        """
        known = choice.provenance
        selector = cls.from_store(
            store,
            list(dict.fromkeys(task_of(name) for name in known["task_names"])),
            known["num_components"],
            [
                ObservedRun(**{argument: values_by_task(values) for argument, values in run.items()})
                for run in known["observed_runs"]
            ],
            values_by_task(known["sampling_weights"]),
            cluster_counts(known["task_names"]),
            known.get("task_loss_weighting", "tokens"),
            known.get("length", 1.0),
            other_lengths=known.get("other_lengths", ()),
        )
        choice.check_features(selector.estimator)
        return selector

    def repeat(self, choice: AnyChoice) -> AnyChoice:
        """Make a saved choice again with its own settings; see [`for_choice`].

        Raises:
            `StoreMismatchError`: when the choice was made from other features.
        """
        choice.check_features(self.estimator)
        return getattr(self, choice.made_by)(**choice.arguments())

    def select(
        self,
        target: Targets = None,
        method: str = "forward",
        max_auxiliary: int | None = None,
        *,
        max_examples: int | None = None,
        max_tokens: int | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        metric: str = "loss",
        search_rows: int | None = SEARCH_ROWS,
        verified_candidates: int = 3,
        max_verified: int | None = None,
        verify: Verify | None = None,
        **options: Any,
    ) -> Selection:
        """Select tasks to train on for the best predicted score on the targets.

        Searches stop when no task is predicted to help.

        Args:
            target (`str`, `Sequence[str]` or `dict[str, float]`, *optional*):
                Task or tasks to optimize, with equal or given weights. All tasks by default.
            method (`str`, *optional*, defaults to `"forward"`):
                `"forward"`, `"backward"`, `"exhaustive"` (for few tasks), `"random_ensemble"` (GradEx), `"mixture"`
                (with sampling weights), or a baseline: `"all"`, `"alone"`, `"random"`, `"gradient_similarity"`.
            max_auxiliary (`int`, *optional*): maximum number of tasks besides the targets.
            max_examples (`int`, *optional*): maximum number of training rows of these tasks in total.
            max_tokens (`int`, *optional*): maximum number of answer tokens of these rows in total.
            include (`Sequence[str]`, *optional*):
                Required tasks. Defaults to the targets, and to none when all tasks are targets.
            exclude (`Sequence[str]`, *optional*): tasks that must not be selected.
            metric (`str`, *optional*, defaults to `"loss"`):
                Metric to optimize: predicted `"loss"` or `"accuracy"`, or `"answers"`, which `verify` measures.
            search_rows (`int`, *optional*, defaults to 50,000):
                Training rows of all tasks together, and validation rows, that `"forward"` and `"backward"` look at.
                Where there are more they look at an equal number of each task, and what they come to is predicted from
                all rows, see [`sampled_selection`]. `None` for all rows.
            verified_candidates, max_verified, verify:
                With `metric="answers"`, see [`verified_selection`]: candidates of each step and in all that are
                verified, and the function that does it. [`SelectionSFTTrainer`] passes one that generates answers.
            options: further arguments of [`random_ensemble_selection`] or [`mixture_selection`].

        Raises:
            `ConfigurationError`: for unknown names, budgets that cannot be met, and what a method does not support.
        """
        settings = SelectionSettings(
            method, max_auxiliary, max_examples, max_tokens, metric, verified_candidates, max_verified, search_rows
        )
        problem = SelectionProblem(self.estimator, target, settings, include, exclude)
        return select_tasks(problem, self.similarity, verify, **options)

    def left_out(self, selection: Selection) -> dict[str, dict[str, str]]:
        """Training rows of the clusters that a selection leaves out: a reason by example id, by task.

        [`TaskSet.without`] takes them. Tasks without a selected cluster are absent: they are left out as a whole.
        """
        taken = {task_of(name) for name in selection.tasks}
        found: dict[str, dict[str, str]] = {}
        for cluster, example in self.estimator.training_ids:
            task = task_of(cluster)
            if cluster in selection.tasks or task not in taken:
                continue
            size = self.estimator.counts[self.estimator.task_names.index(cluster)]
            found.setdefault(task, {})[example] = (
                f"{cluster}, a cluster of {size} rows, is not predicted to lower the {selection.settings['metric']} of "
                f"{', '.join(selection.targets)}"
            )
        return found

    def mixture(self, targets: Targets = None, **options: Any) -> Mixture:
        """Sampling weights with the least predicted loss of `targets`; see [`optimize_mixture`]."""
        check_options(optimize_mixture, options, "mixture")
        return optimize_mixture(self.estimator, targets, **options)

    def score_examples(
        self, targets: Targets = None, tasks: Sequence[str] | Mapping[str, float] | None = None
    ) -> ExampleScores:
        """Influence of each training row on the loss of `targets` in a training on `tasks`; see [`score_examples`]."""
        return score_examples(self.estimator, targets, tasks)

    def group(
        self,
        num_groups: int | None = None,
        method: str = "direct",
        *,
        max_groups: int | None = None,
        group_cost: float = 0.0,
        overlapping_groups: bool = False,
        affinity_subsets: int = 400,
        compute_budget: float | None = None,
        group_initialization: str = "fresh",
        search_rows: int | None = SEARCH_ROWS,
        **options: Any,
    ) -> Grouping:
        """Group the tasks for one adapter per group.

        Args:
            num_groups (`int`, *optional*): number of groups. Chosen by predicted loss by default.
            method (`str`, *optional*, defaults to `"direct"`):
                `"mixtures"`, `"direct"`, `"spectral"`, `"semidefinite"` or `"coclustering"`, see [`group_tasks`].
            max_groups (`int`, *optional*):
                Maximum number of groups when the number is chosen. The number of tasks by default; of mixtures eight,
                or one for each task.
            group_cost (`float`, *optional*, defaults to 0.0):
                Minimum reduction of the mean loss, in nats, for one more group when the number is chosen.
            overlapping_groups (`bool`, *optional*, defaults to `False`):
                Also train a group on tasks of other groups that help its own tasks.
            affinity_subsets (`int`, *optional*, defaults to 400):
                Number of random subsets that the affinity matrix is estimated from.
            compute_budget (`float`, *optional*):
                With `"mixtures"`, maximum training cost of all adapters, in multiples of one adapter for all tasks.
            group_initialization (`str`, *optional*, defaults to `"fresh"`):
                Where their trainings begin: `"fresh"`, or `"baseline"`, where the adapter for all tasks has ended. The
                gradients have to be captured there, and [`from_store`]'s `length` is how long trainings go on; with
                `other_lengths`, `"mixtures"` chooses the length of each.
            search_rows (`int`, *optional*, defaults to 50,000):
                Training rows of all tasks together, and validation rows, that the search looks at. Where there are more
                it looks at an equal number of each task, and the losses of what it comes to are predicted from all
                rows. `None` for all rows.
            options: further arguments of [`group_tasks`].

        Raises:
            `ConfigurationError`: for an unknown method, and more groups than tasks.
        """
        check_options(group_tasks, options, "group", ("settings",))
        settings = GroupingSettings(
            num_groups,
            max_groups,
            method,
            group_cost,
            overlapping_groups,
            affinity_subsets,
            compute_budget,
            group_initialization,
            search_rows=search_rows,
        )
        return group_tasks(self.estimator, settings, **options)

    def affinity(self, **options: Any) -> np.ndarray:
        """How much better than average each task does beside each other, `(T, T)`; see [`predicted_affinity`]."""
        check_options(predicted_affinity, options, "affinity")
        return predicted_affinity(self.estimator, **options)
