"""`DataSelector`: the questions one asks of a gradient store."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..estimate import ObservedRun, SubsetEstimator
from ..store import GradientStore
from .affinity import predicted_affinity
from .examples import ExampleScores, score_examples
from .grouping import Grouping, group_tasks
from .methods import select_tasks
from .mixture import Mixture, optimise_mixture
from .selection import Selection


class DataSelector:
    """Chooses tasks by predicted fine-tuning outcomes.

    Args:
        estimator (`SubsetEstimator`): predictions.

    Example:

    ```python
    >>> selector = DataSelector.from_store("out/gradients")  # doctest: +SKIP
    >>> selector.select(target="sst2").auxiliary  # doctest: +SKIP
    ['mr', 'cr', 'tweet_sentiment']
    >>> selector.group(num_groups=4).groups  # doctest: +SKIP
    ```
    """

    def __init__(self, estimator: SubsetEstimator):
        self.estimator = estimator

    @classmethod
    def from_store(
        cls,
        store: str | Path | GradientStore,
        tasks: Sequence[str] | None = None,
        num_components: int = 400,
        observed_runs: Sequence[ObservedRun] = (),
        sampling_weights: Mapping[str, float] | None = None,
    ) -> "DataSelector":
        """From a store's directory, over all of its tasks or some; see [`SubsetEstimator`] for the rest.

        Without observed runs, the training that the store knows of is replayed.
        """
        store = store if isinstance(store, GradientStore) else GradientStore(store)
        names = store.task_names if tasks is None else tasks
        train = store.table("train", names)
        recipe = store.recipe
        if recipe is not None:
            # Fewer rows are trained on for fewer steps.
            recipe = recipe.shortened(len(train) / store.num_rows("train"))
        validation = store.table("validation", names)
        return cls(SubsetEstimator(train, validation, num_components, observed_runs, sampling_weights, recipe))

    def select(self, target: str, method: str = "forward", k: int | None = None, **options) -> Selection:
        """Auxiliary tasks that help `target`, at most `k`.

        Args:
            target (`str`): the task to do well on.
            method (`str`, *optional*, defaults to `"forward"`): `"forward"`, `"random_ensemble"` or `"mixture"`.
            k (`int`, *optional*): auxiliary tasks to take at most.
            options: further arguments of [`forward_selection`], [`random_ensemble_selection`] or [`mixture_selection`].
        """
        return select_tasks(self.estimator, target, method, max_tasks=k, **options)

    def mixture(self, targets: str | Sequence[str] | Mapping[str, float], **options) -> Mixture:
        """Sampling weights of the tasks that do best on `targets`; see [`optimise_mixture`]."""
        return optimise_mixture(self.estimator, targets, **options)

    def score_examples(
        self,
        targets: str | Sequence[str] | Mapping[str, float],
        tasks: Sequence[str] | Mapping[str, float] | None = None,
    ) -> ExampleScores:
        """How much each training row helps `targets` in a training on `tasks`; see [`score_examples`]."""
        return score_examples(self.estimator, targets, tasks)

    def group(self, num_groups: int | str = "auto", method: str = "direct", **options) -> Grouping:
        """Groups of tasks to train one adapter each; see [`group_tasks`]."""
        return group_tasks(self.estimator, num_groups, method, **options)

    def affinity(self, **options) -> np.ndarray:
        """How much better than usual each task does beside each other, `(T, T)`; see [`predicted_affinity`]."""
        return predicted_affinity(self.estimator, **options)
