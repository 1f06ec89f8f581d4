"""What a selection is asked for: targets, a measure, what has to be in or out, and a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigurationError
from ..estimate import Prediction, SubsetEstimator
from ..estimate.mixtures import mixture_weights

METRICS = ("loss", "accuracy")
# Normal quantile: a difference within so many standard errors of zero may be chance, at 90 %.
_CLOSE = 1.645
Targets = str | Sequence[str] | Mapping[str, float] | None


def target_weights(targets: Targets, estimator: SubsetEstimator) -> dict[str, float]:
    """Weight of each target's score; several without weights count alike, `None` stands for all tasks.

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
class Scored:
    """Predicted scores of `S` subsets on the targets; lower is better.

    Args:
        value (`np.ndarray` of shape `(S,)`): weighted loss in nats, or weighted error (one less the accuracy).
        prediction (`Prediction`): of the subsets.
    """

    value: np.ndarray
    prediction: Prediction


class SelectionProblem:
    """Which tasks to train on, so that the targets do well.

    Args:
        estimator (`SubsetEstimator`): predictions.
        target (`str`, `Sequence[str]` or `dict[str, float]`, *optional*):
            What to do well on, with weights or alike; all tasks by default.
        max_tasks (`int`, *optional*): tasks to take beside the targets at most.
        max_examples (`int`, *optional*): training rows that these tasks may have together.
        max_tokens (`int`, *optional*): answer tokens that these rows may have together.
        include (`Sequence[str]`, *optional*):
            Tasks that are trained on in any case; the targets by default, and none when all tasks are targets.
        exclude (`Sequence[str]`, *optional*): tasks that are not trained on in any case.
        metric (`str`, *optional*, defaults to `"loss"`): what is predicted and compared, or `"accuracy"`.

    Raises:
        `ConfigurationError`: for unknown names, a task both in and out, required tasks over the budget, a budget in
            tokens where nobody counted them.
    """

    def __init__(
        self,
        estimator: SubsetEstimator,
        target: Targets = None,
        max_tasks: int | None = None,
        max_examples: int | None = None,
        max_tokens: int | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        metric: str = "loss",
    ):
        self.estimator = estimator
        self.names = estimator.task_names
        self.targets = target_weights(target, estimator)
        if metric not in METRICS:
            raise ConfigurationError(f"metric has to be one of {METRICS}, found {metric!r}.")
        self.metric = metric
        if include is None:
            include = () if len(self.targets) == len(self.names) > 1 else tuple(self.targets)
        unknown = sorted({*include, *exclude} - set(self.names))
        if unknown:
            raise ConfigurationError(f"Unknown tasks {unknown}; the tasks are {list(self.names)}.")
        both = sorted(set(include) & set(exclude))
        if both:
            raise ConfigurationError(f"The tasks {both} are to be both in and out.")
        self.required = mixture_weights(include, self.names) > 0
        self.free = ~self.required & ~(mixture_weights(exclude, self.names) > 0)
        if not (self.required | self.free).any():
            raise ConfigurationError("Every task is excluded: nothing is left to train on.")
        if max_tokens is not None and estimator.token_counts is None:
            raise ConfigurationError("max_tokens needs the tokens of every row; these features do not have them.")
        self.budgets = {"max_tasks": max_tasks, "max_examples": max_examples, "max_tokens": max_tokens}
        self._limits = [
            (costs * (mixture_weights(self.targets, self.names) == 0), limit)
            for costs, limit in (
                (np.ones(len(self.names)), max_tasks),
                (estimator.counts, max_examples),
                (estimator.token_counts, max_tokens),
            )
            if limit is not None
        ]
        if not self.fits(self.required):
            raise ConfigurationError(f"The tasks that have to be in are over the budget {self._asked(self.budgets)}.")
        self.settings = {
            "include": list(include),
            "exclude": list(exclude),
            "metric": metric,
            **self._asked(self.budgets),
        }

    @staticmethod
    def _asked(budgets: Mapping[str, int | None]) -> dict[str, int]:
        return {name: limit for name, limit in budgets.items() if limit is not None}

    def fits(self, mask: np.ndarray) -> bool:
        """Whether a subset `(T,)` is within the budget."""
        return all(mask @ costs <= limit for costs, limit in self._limits)

    def named(self, mask: np.ndarray) -> list[str]:
        return [name for name, held in zip(self.names, mask) if held]

    def score(self, masks: np.ndarray) -> Scored:
        """Predicted scores of subsets `(S, T)`."""
        prediction = self.estimator.predict(np.asarray(masks, dtype=np.float64))
        return Scored(self._weighted(prediction.loss, prediction.accuracy), prediction)

    def _weighted(self, loss: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
        measure = loss if self.metric == "loss" else 1.0 - accuracy
        return measure @ mixture_weights(self.targets, self.names)

    def close_calls(self, scored: Scored, best: int) -> np.ndarray:
        """Which subsets cannot be told from the best one, `(S,)`.

        Their predicted scores differ by less than the difference's standard error over the validation rows times 1.645,
        so that other validation rows might have preferred them; see [`SubsetEstimator.score_spread`].
        """
        coefficients = scored.prediction.coefficients
        goal = mixture_weights(self.targets, self.names)
        spread = self.estimator.score_spread(coefficients, coefficients[best], goal, self.metric)
        close = scored.value - scored.value[best] <= _CLOSE * spread
        close[best] = False
        return close

    def step(self, scored: Scored, row: int) -> dict[str, Any]:
        """What a path says of one subset: predicted loss with the ends of its interval, and the metric."""
        prediction, goal = scored.prediction, mixture_weights(self.targets, self.names)
        low, high = float(prediction.loss_low[row] @ goal), float(prediction.loss_high[row] @ goal)
        found = {
            "predicted_loss": float(prediction.loss[row] @ goal),
            "interval": [low, high] if np.isfinite(low) else None,
        }
        if self.metric == "accuracy":
            found["predicted_accuracy"] = float(prediction.accuracy[row] @ goal)
        return found
