"""What a selection has to solve: targets, a metric, required and excluded tasks, and a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigurationError
from ..estimate import Prediction, SubsetEstimator
from ..estimate.mixtures import mixture_weights
from .settings import SelectionSettings

# Normal quantile: at 90 %, a difference within this many standard errors of zero may be due to chance.
_CLOSE = 1.645
Targets = str | Sequence[str] | Mapping[str, float] | None


def target_weights(targets: Targets, estimator: SubsetEstimator) -> dict[str, float]:
    """Weight of each target's score: equal where no weights are given; `None` stands for all tasks.

    Raises:
        `ConfigurationError`: for unknown tasks, no targets, and weights that are not positive.
    """
    if targets is None:
        targets = estimator.task_names
    if isinstance(targets, str):
        targets = [targets]
    weights = dict(targets) if isinstance(targets, Mapping) else dict.fromkeys(targets, 1.0 / max(len(targets), 1))
    if not weights or not all(np.isfinite(weight) and weight > 0 for weight in weights.values()):
        raise ConfigurationError(f"Expected targets with positive weights, found {weights}.")
    for target in weights:
        if target not in estimator.task_names:
            raise ConfigurationError(f"Unknown target {target!r}; the tasks are {list(estimator.task_names)}.")
    return {name: float(weight) for name, weight in weights.items()}


@dataclass(frozen=True)
class SubsetScores:
    """Predicted scores of `S` subsets on the targets, lower is better.

    Args:
        value (`np.ndarray` of shape `(S,)`): weighted loss in nats, or weighted error (1 - accuracy).
        prediction (`Prediction`): predictions of the subsets.
    """

    value: np.ndarray
    prediction: Prediction


class SelectionProblem:
    """Which tasks to train on for the best predicted score on the targets.

    Args:
        estimator (`SubsetEstimator`): makes the predictions.
        target (`str`, `Sequence[str]` or `dict[str, float]`, *optional*):
            Task or tasks to optimize, with equal or given weights. All tasks by default.
        settings (`SelectionSettings`, *optional*): metric, budgets and method.
        include (`Sequence[str]`, *optional*):
            Required tasks. Defaults to the targets, and to none when all tasks are targets.
        exclude (`Sequence[str]`, *optional*): tasks that must not be selected.

    Raises:
        `ConfigurationError`:
            For unknown names, a task both included and excluded, limits above the number of tasks, required tasks over
            the budget, and `max_tokens` where the features have no token counts.
    """

    def __init__(
        self,
        estimator: SubsetEstimator,
        target: Targets = None,
        settings: SelectionSettings | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
    ):
        self.estimator = estimator
        self.names = estimator.task_names
        self.targets = target_weights(target, estimator)
        self.settings = settings or SelectionSettings()
        self.settings.check_tasks(len(self.names))
        if include is None:
            include = () if len(self.targets) == len(self.names) > 1 else tuple(self.targets)
        self._include, self._exclude = list(include), list(exclude)
        unknown = sorted({*include, *exclude} - set(self.names))
        if unknown:
            raise ConfigurationError(f"Unknown tasks {unknown}; the tasks are {list(self.names)}.")
        both = sorted(set(include) & set(exclude))
        if both:
            raise ConfigurationError(f"The tasks {both} are both included and excluded. Drop them from one of the two.")
        self.required = mixture_weights(include, self.names) > 0
        self.optional = ~self.required & ~(mixture_weights(exclude, self.names) > 0)
        if not (self.required | self.optional).any():
            raise ConfigurationError("Every task is excluded: nothing is left to train on.")
        if self.settings.max_tokens is not None and estimator.token_counts is None:
            raise ConfigurationError(
                "max_tokens needs the number of answer tokens of each row, which these features do not have. Capture "
                "the gradients again, or use max_examples."
            )
        costs = {
            "max_auxiliary": np.ones(len(self.names)),
            "max_examples": estimator.counts,
            "max_tokens": estimator.token_counts,
        }
        is_auxiliary = mixture_weights(self.targets, self.names) == 0
        self._limits = [(costs[name] * is_auxiliary, limit) for name, limit in self.settings.budgets().items()]
        if not self.fits(self.required):
            raise ConfigurationError(
                f"The required tasks exceed the budget {self.settings.budgets()}. Raise it, or include fewer tasks."
            )

    def arguments(self) -> dict[str, Any]:
        """Arguments of [`DataSelector.select`] besides target and method."""
        return {
            "include": self._include,
            "exclude": self._exclude,
            **self.settings.metric_arguments(),
            **self.settings.budgets(),
        }

    def fits(self, mask: np.ndarray) -> bool:
        """Whether a subset `(T,)` is within the budget."""
        return all(mask @ costs <= limit for costs, limit in self._limits)

    def names_of(self, mask: np.ndarray) -> list[str]:
        """Task names of a subset `(T,)`."""
        return [name for name, held in zip(self.names, mask) if held]

    def score(self, masks: np.ndarray) -> SubsetScores:
        """Predicted scores of subsets `(S, T)`."""
        prediction = self.estimator.predict(np.asarray(masks, dtype=np.float64))
        measure = 1.0 - prediction.accuracy if self.settings.selection_metric == "accuracy" else prediction.loss
        return SubsetScores(measure @ mixture_weights(self.targets, self.names), prediction)

    def close_calls(self, scored: SubsetScores, best: int) -> np.ndarray:
        """Subsets that cannot be distinguished from the best one, as a mask `(S,)`.

        Their predicted scores differ from the best by less than 1.645 standard errors of the difference over the
        validation rows, so other validation rows might have preferred them; see [`SubsetEstimator.score_spread`].
        """
        coefficients = scored.prediction.coefficients
        goal = mixture_weights(self.targets, self.names)
        predicted = "accuracy" if self.settings.selection_metric == "accuracy" else "loss"
        spread = self.estimator.score_spread(coefficients, coefficients[best], goal, predicted)
        close = scored.value - scored.value[best] <= _CLOSE * spread
        close[best] = False
        return close

    def path_entry(self, scored: SubsetScores, row: int) -> dict[str, Any]:
        """A subset's entry in [`Selection.path`]."""
        prediction, goal = scored.prediction, mixture_weights(self.targets, self.names)
        low, high = float(prediction.loss_low[row] @ goal), float(prediction.loss_high[row] @ goal)
        entry = {
            "predicted_loss": float(prediction.loss[row] @ goal),
            "interval": [low, high] if np.isfinite(low) else None,
        }
        if self.settings.selection_metric == "accuracy":
            entry["predicted_accuracy"] = float(prediction.accuracy[row] @ goal)
        return entry
