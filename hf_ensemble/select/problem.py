"""What a selection has to solve: targets, a metric, required and excluded tasks, and a budget."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._settings import check_number, checked_names
from ..errors import ConfigurationError
from ..estimate import Prediction, SubsetEstimator
from ..estimate.mixtures import mixture_weights
from .settings import SelectionSettings

# Number of (subset, task) pairs to predict from which on a step of a search estimates first.
_SLOW = 2_000
# Number of subsets that are predicted at once where they are ranked by estimates.
_NUM_PREDICTED = 8
# Normal quantile: at 90 %, a difference within this many standard errors of zero may be due to chance.
_CLOSE = 1.645
# Scores of equal subsets differ by this much at most, as their optima are found in different batches.
_ROUNDING = 1e-9
Targets = str | Sequence[str] | Mapping[str, float] | None


def target_weights(targets: Targets, estimator: SubsetEstimator) -> dict[str, float]:
    """Weight of each target's score: equal where no weights are given; `None` stands for all tasks.

    Raises:
        `ConfigurationError`: for unknown tasks, no targets, and weights that are not positive.
    """
    if targets is None:
        targets = estimator.task_names
    names = checked_names("targets", targets, estimator.task_names)
    if not names:
        raise ConfigurationError(f"Expected at least one target, found none; the tasks are {estimator.task_names}.")
    weights = targets if isinstance(targets, Mapping) else dict.fromkeys(names, 1.0 / len(names))
    for name, weight in weights.items():
        check_number(f"The weight of the target {name!r}", weight, 0, above=True)
    return {name: float(weight) for name, weight in weights.items()}


@dataclass(frozen=True)
class SubsetScores:
    """Predicted scores of `S` subsets on the targets, lower is better.

    Args:
        value (`np.ndarray` of shape `(S,)`): weighted loss in nats, or weighted error (1 - accuracy).
        prediction (`Prediction`): predictions of the subsets for the targets.
        is_exact (`bool`): whether all of them are predicted; otherwise those with large scores are estimated.
    """

    value: np.ndarray
    prediction: Prediction
    is_exact: bool = True

    @property
    def best(self) -> int:
        """The subset with the least score; the first of those that are equal but for rounding."""
        return int(np.argmax(self.value <= self.value.min() + _ROUNDING))


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
        self._goal = mixture_weights(self.targets, self.names)
        self.settings = settings or SelectionSettings()
        self.settings.check_tasks(len(self.names))
        is_default = include is None
        if is_default:
            include = () if len(self.targets) == len(self.names) > 1 else tuple(self.targets)
        include = self._include = checked_names("tasks to include", include, self.names)
        exclude = self._exclude = checked_names("tasks to exclude", exclude, self.names)
        both = sorted(set(include) & set(exclude))
        if both:
            advice = "Drop them from one of the two"
            if is_default:
                advice = "Targets are included unless include says otherwise: include=[]"
            raise ConfigurationError(f"The tasks {both} are both included and excluded. {advice}.")
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
        is_auxiliary = self._goal == 0
        self._limits = [(costs[name] * is_auxiliary, limit) for name, limit in self.settings.budgets().items()]
        if not self.fits(self.required):
            raise ConfigurationError(
                f"The required tasks exceed the budget {self.settings.budgets()}. Raise it, or include fewer tasks."
            )
        self.fits_alone = self.optional & np.array([self.fits(one) for one in np.eye(len(self.names), dtype=bool)])
        if not self.required.any() and not self.fits_alone.any():
            raise ConfigurationError(
                f"None of the tasks {self.names_of(self.optional)} is within the budget {self.settings.budgets()}. "
                "Raise it."
            )

    def arguments(self) -> dict[str, Any]:
        """Arguments of [`DataSelector.select`] besides target and method."""
        return {
            "include": self._include,
            "exclude": self._exclude,
            "search_rows": self.settings.search_rows,
            **self.settings.metric_arguments(),
            **self.settings.budgets(),
        }

    @property
    def has_many_rows(self) -> bool:
        """Whether there are more rows than searches look at."""
        most = self.settings.search_rows
        return most is not None and self.estimator.num_rows > most

    def for_search(self) -> "SelectionProblem":
        """The same problem on the rows that searches look at."""
        other = copy.copy(self)
        if self.has_many_rows:
            other.estimator = self.estimator.sampled(self.settings.search_rows)
        return other

    def fits(self, mask: np.ndarray) -> bool:
        """Whether a subset `(T,)` is within the budget."""
        return all(mask @ costs <= limit for costs, limit in self._limits)

    def names_of(self, mask: np.ndarray) -> list[str]:
        """Task names of a subset `(T,)`."""
        return [name for name, held in zip(self.names, mask) if held]

    def score(self, masks: np.ndarray) -> SubsetScores:
        """Predicted scores of subsets `(S, T)`."""
        prediction = self.estimator.predict(np.asarray(masks, dtype=np.float64), needed=self._needed(len(masks)))
        return SubsetScores(self._values(prediction), prediction)

    def losses(self, masks: np.ndarray) -> np.ndarray:
        """Predicted loss of the targets for subsets `(S, T)`, `(S,)`."""
        return self._sum(self.score(masks).prediction.loss)

    def score_toggled(self, mask: np.ndarray, tasks: np.ndarray, optimum: np.ndarray | None = None) -> SubsetScores:
        """Scores of a subset `(T,)` with one task more, or less where it has the task, for each task `(C,)`.

        Where predicting all of them takes long, they are estimated, and those that may be the best are predicted: all
        whose estimate is above the best score by less than three times the largest error of an estimate so far. The
        subset's own `optimum` `(k,)` saves a part of the time.
        """
        tasks = np.asarray(tasks)
        masks = np.repeat(np.asarray(mask, dtype=bool)[None], len(tasks), axis=0)
        masks[np.arange(len(tasks)), tasks] ^= True
        is_fast = len(tasks) <= 2 * _NUM_PREDICTED or masks.sum() <= _SLOW
        if is_fast or not mask.any() or self.settings.selection_metric == "accuracy":
            return self.score(masks)
        prediction = self.estimator.predict_toggled(mask, tasks, self._needed(len(tasks)), optimum)
        value = self._values(prediction)
        estimated, known = value.copy(), np.zeros(len(tasks), dtype=bool)
        rows = np.argsort(estimated, kind="stable")[:_NUM_PREDICTED]
        while len(rows):
            value[rows] = self._take_exact(prediction, masks[rows], rows)
            known[rows] = True
            error = np.abs(value[known] - estimated[known]).max()
            rows = np.flatnonzero(~known & (estimated <= value[known].min() + 3 * error))
        return SubsetScores(value, prediction, bool(known.all()))

    def estimate_toggled(self, mask: np.ndarray, tasks: np.ndarray, optimum: np.ndarray) -> SubsetScores:
        """[`score_toggled`] by estimates alone, but for the few that may be the best by these."""
        prediction = self.estimator.predict_toggled(mask, tasks, self._needed(len(tasks)), optimum)
        value = self._values(prediction)
        rows = np.argsort(value, kind="stable")[:_NUM_PREDICTED]
        masks = np.repeat(np.asarray(mask, dtype=bool)[None], len(rows), axis=0)
        masks[np.arange(len(rows)), np.asarray(tasks)[rows]] ^= True
        value[rows] = self._take_exact(prediction, masks, rows)
        return SubsetScores(value, prediction, is_exact=False)

    def _take_exact(self, prediction: Prediction, masks: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Scores of the subsets `masks` `(s, T)`, whose predictions replace the estimates in `rows` `(s,)`."""
        needed, start = self._needed(len(rows)), prediction.coefficients[rows]
        exact = self.estimator.predict(masks.astype(np.float64), needed=needed, initial=start)
        for name in ("loss", "accuracy", "displacement", "coefficients", "gradient_norm"):
            getattr(prediction, name)[rows] = getattr(exact, name)
        return self._values(exact)

    def _needed(self, count: int) -> np.ndarray:
        """Mask of the targets, for `count` subsets."""
        return np.repeat((self._goal > 0)[None], count, axis=0)

    def _values(self, prediction: Prediction) -> np.ndarray:
        measure = 1.0 - prediction.accuracy if self.settings.selection_metric == "accuracy" else prediction.loss
        return self._sum(measure)

    def _sum(self, values: np.ndarray) -> np.ndarray:
        """Weighted sum over the targets of values `(..., T)`; those of other tasks may be NaN."""
        return np.where(self._goal > 0, values, 0.0) @ self._goal

    def close_calls(self, scored: SubsetScores, best: int) -> np.ndarray:
        """Subsets that cannot be distinguished from the best one, as a mask `(S,)`.

        Their predicted scores differ from the best by less than 1.645 standard errors of the difference over the
        validation rows, so other validation rows might have preferred them; see [`SubsetEstimator.score_spread`].
        """
        coefficients = scored.prediction.coefficients
        predicted = "accuracy" if self.settings.selection_metric == "accuracy" else "loss"
        spread = self.estimator.score_spread(coefficients, coefficients[best], self._goal, predicted)
        close = scored.value - scored.value[best] <= _CLOSE * spread + _ROUNDING
        close[best] = False
        return close

    def path_entry(self, scored: SubsetScores, row: int) -> dict[str, Any]:
        """A subset's entry in [`Selection.path`]."""
        prediction = scored.prediction.at(row)
        low, high = float(self._sum(prediction.loss_low[0])), float(self._sum(prediction.loss_high[0]))
        entry = {
            "predicted_loss": float(self._sum(prediction.loss[0])),
            "interval": [low, high] if np.isfinite(low) else None,
            "level": prediction.level if np.isfinite(low) else None,
        }
        if self.settings.selection_metric == "accuracy":
            entry["predicted_accuracy"] = float(self._sum(prediction.accuracy[0]))
        return entry
