"""`DataSelector`: the questions one asks of a gradient store."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..estimate import ObservedRun, SubsetEstimator
from ..store import GradientStore
from .affinity import predicted_affinity
from .baselines import mean_cosines
from .clusters import cluster_counts, divided, divided_runs, divided_weights, task_of, whole_weights
from .examples import ExampleScores, score_examples
from .grouping import Grouping, group_tasks
from .methods import select_tasks
from .mixture import Mixture, optimise_mixture
from .problem import SelectionProblem, Targets
from .provenance import check_same_features
from .selection import Selection

Choice = TypeVar("Choice", Selection, Mixture, Grouping, ExampleScores)


class DataSelector:
    """Chooses tasks by predicted fine-tuning outcomes.

    Args:
        estimator (`SubsetEstimator`): predictions.
        similarity (`np.ndarray` of shape `(T, T)`, *optional*):
            Mean cosines between the gradients of task k's training rows and task j's validation rows, for the baseline.

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
    ) -> "DataSelector":
        """From a store's directory.

        Args:
            store (`str`, `Path` or `GradientStore`): the store.
            tasks (`Sequence[str]`, *optional*): of its tasks these; all by default.
            num_components, observed_runs, sampling_weights:
                See [`SubsetEstimator`]. Without observed runs, the training that the store knows of is replayed.
            clusters (`dict[str, int]`, *optional*):
                Divide a task's training rows into so many parts, each a task `TASK/0`, `TASK/1`, ... that can be chosen
                or left out, see [`divided`] and [`left_out`].

        Raises:
            `StoreError`: for a store that is not whole.
            `ConfigurationError`: for unknown tasks to divide, and more parts than rows.
        """
        store = store if isinstance(store, GradientStore) else GradientStore(store)
        names = store.task_names if tasks is None else tasks
        train = store.table("train", names)
        recipe = store.recipe
        if recipe is not None:
            # Fewer rows are trained on for fewer steps.
            recipe = recipe.shortened(len(train) / store.num_rows("train"))
        validation = store.table("validation", names)
        if clusters:
            train, validation = divided(train, validation, clusters)
            observed_runs = divided_runs(observed_runs, train.task_names)
            sampling_weights = divided_weights(sampling_weights or {}, train.task_names)
        estimator = SubsetEstimator(train, validation, num_components, observed_runs, sampling_weights, recipe)
        return cls(estimator, mean_cosines(train, validation))

    @classmethod
    def for_choice(
        cls, store: str | Path | GradientStore, choice: Selection | Mixture | Grouping | ExampleScores
    ) -> "DataSelector":
        """The selector that a saved choice was made with, from the same store.

        Raises:
            `StoreMismatchError`: when the store is not the one that the choice was made from; what differs is named.
        """
        known = choice.settings["estimator"]
        selector = cls.from_store(
            store,
            list(dict.fromkeys(task_of(name) for name in known["task_names"])),
            known["num_components"],
            [
                ObservedRun(whole_weights(run["mixture"]), whole_weights(run["losses"]))
                for run in known["observed_runs"]
            ],
            whole_weights(known["sampling_weights"]),
            cluster_counts(known["task_names"]),
        )
        check_same_features(selector.estimator, choice.settings)
        return selector

    def repeat(self, choice: Choice) -> Choice:
        """Make a saved choice again, by its own settings; see [`for_choice`].

        Raises:
            `StoreMismatchError`: when the predictions are made from other features than the choice's.
        """
        check_same_features(self.estimator, choice.settings)
        own = {key: value for key, value in choice.settings.items() if key != "estimator"}
        if isinstance(choice, Selection):
            return self.select(choice.targets, choice.method, own.pop("max_tasks", None), **own)
        if isinstance(choice, Mixture):
            return self.mixture(choice.targets, **own)
        if isinstance(choice, Grouping):
            return self.group(method=choice.method, **own)
        return self.score_examples(choice.targets, **own)

    def select(
        self,
        target: Targets = None,
        method: str = "forward",
        k: int | None = None,
        *,
        max_examples: int | None = None,
        max_tokens: int | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        metric: str = "loss",
        **options: Any,
    ) -> Selection:
        """Tasks to train on so that the targets do well; the search stops by itself when nothing helps any more.

        Args:
            target (`str`, `Sequence[str]` or `dict[str, float]`, *optional*):
                What to do well on, with weights or alike; all tasks by default.
            method (`str`, *optional*, defaults to `"forward"`):
                `"forward"`, `"backward"`, `"exhaustive"` (for few tasks), `"random_ensemble"` (GradEx), `"mixture"`
                (with sampling weights); or a baseline: `"all"`, `"alone"`, `"random"`, `"gradient_similarity"`.
            k (`int`, *optional*): tasks to take beside the targets at most.
            max_examples (`int`, *optional*): training rows that these tasks may have together.
            max_tokens (`int`, *optional*): answer tokens that these rows may have together.
            include (`Sequence[str]`, *optional*):
                Tasks that are trained on in any case; the targets by default, and none when all tasks are targets.
            exclude (`Sequence[str]`, *optional*): tasks that are not trained on in any case.
            metric (`str`, *optional*, defaults to `"loss"`): or `"accuracy"`.
            options: further arguments of [`random_ensemble_selection`] or [`mixture_selection`].

        Raises:
            `ConfigurationError`: for unknown names, budgets that cannot be kept, and what a method does not take.
        """
        problem = SelectionProblem(self.estimator, target, k, max_examples, max_tokens, include, exclude, metric)
        return select_tasks(problem, method, self.similarity, **options)

    def left_out(self, selection: Selection) -> dict[str, dict[str, str]]:
        """Training rows of the parts that a selection does not take, each with the reason; see `clusters`.

        What [`TaskSet.without`] takes. Tasks of which nothing is taken are not named: they are left out whole.
        """
        taken = {task_of(name) for name in selection.tasks}
        found: dict[str, dict[str, str]] = {}
        for part, example in self.estimator.training_ids:
            task = task_of(part)
            if part in selection.tasks or task not in taken:
                continue
            size = self.estimator.counts[self.estimator.task_names.index(part)]
            found.setdefault(task, {})[example] = (
                f"{part}, a cluster of {size} rows, is not predicted to lower the {selection.settings['metric']} of "
                f"{', '.join(selection.targets)}"
            )
        return found

    def mixture(self, targets: Targets = None, **options: Any) -> Mixture:
        """Sampling weights of the tasks that do best on `targets`; see [`optimise_mixture`]."""
        return optimise_mixture(self.estimator, targets, **options)

    def score_examples(
        self, targets: Targets = None, tasks: Sequence[str] | Mapping[str, float] | None = None
    ) -> ExampleScores:
        """How much each training row helps `targets` in a training on `tasks`; see [`score_examples`]."""
        return score_examples(self.estimator, targets, tasks)

    def group(self, num_groups: int | str = "auto", method: str = "direct", **options: Any) -> Grouping:
        """Groups of tasks to train one adapter each; see [`group_tasks`]."""
        return group_tasks(self.estimator, num_groups, method, **options)

    def affinity(self, **options: Any) -> np.ndarray:
        """How much better than usual each task does beside each other, `(T, T)`; see [`predicted_affinity`]."""
        return predicted_affinity(self.estimator, **options)
