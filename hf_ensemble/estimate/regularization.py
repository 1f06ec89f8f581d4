"""Fits the constant of the surrogate's penalty."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Literal

import numpy as np
from scipy.optimize import minimize_scalar

from .._settings import check_number, checked_mapping
from ..errors import EstimationError
from ..logging import get_logger
from .mixtures import mixture_weights

_GRID = np.logspace(-3, 3, 25)
# Losses are divided by at least this.
_MIN_LOSS = 1e-12

logger = get_logger(__name__)


@dataclass(frozen=True)
class ObservedRun:
    """A fine-tuning with known validation losses.

    Args:
        mixture (`dict[str, float]`): weight of each task's rows in training.
        losses (`dict[str, float]`): mean validation loss of each evaluated task; NaN where it is unknown.

    Raises:
        `EstimationError`: for weights and losses that are no numbers, or negative, and for a mixture without a task.
    """

    mixture: Mapping[str, float]
    losses: Mapping[str, float]

    def __post_init__(self):
        for name, weight in checked_mapping("the mixture of an observed run", self.mixture, EstimationError).items():
            check_number(f"The weight of {name!r} in an observed run", weight, 0, error=EstimationError)
        if not any(self.mixture.values()):
            raise EstimationError(f"Expected an observed run on at least one task, found the mixture {self.mixture}.")
        for name, loss in checked_mapping("the losses of an observed run", self.losses, EstimationError).items():
            if not (isinstance(loss, float) and isnan(loss)):
                check_number(f"The loss of {name!r} in an observed run", loss, 0, error=EstimationError)


@dataclass(frozen=True)
class Regularization:
    """The constant c of the penalty and how it was fitted.

    Args:
        l2_scale (`float`): the constant c.
        evidence (`str`): what c was fitted to: `"observed_runs"`, `"replay"` or `"validation_loss"`.
        criterion (`float`): minimum reached: mean relative error over the runs' losses, or mean predicted loss.
    """

    l2_scale: float
    evidence: Literal["observed_runs", "replay", "validation_loss"]
    criterion: float


def losses_of(runs: Sequence[ObservedRun], task_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mixtures and losses of runs, both `(S, T)`; unknown losses are NaN.

    Raises:
        `EstimationError`: for runs without a known task or a finite loss.
    """
    mixtures = np.array([mixture_weights(run.mixture, task_names) for run in runs])
    losses = np.array([[run.losses.get(name, np.nan) for name in task_names] for run in runs], dtype=np.float64)
    if not np.isfinite(losses).any():
        raise EstimationError(
            f"Expected observed runs with a finite loss of the tasks {list(task_names)}, found no finite loss of them."
        )
    return mixtures, losses


def choose_regularization(
    predict_loss: Callable[[np.ndarray, float], np.ndarray],
    task_names: Sequence[str],
    observed_runs: Sequence[ObservedRun] = (),
    replayed_runs: Sequence[ObservedRun] = (),
) -> Regularization:
    """Fit c.

    With observed or else replayed runs, c minimizes the mean relative error of their predicted losses, so that the
    surrogate moves as far as training does. Without runs, c minimizes the predicted validation loss over every task
    alone and all tasks together, as if the length of training were optimal for the data, which it rarely is.

    Args:
        predict_loss (`Callable`): maps mixtures `(S, T)` and a candidate c to predicted losses `(S, T)`.
        task_names (`Sequence[str]`): task names.
        observed_runs (`Sequence[ObservedRun]`, *optional*): fine-tunings with known losses.
        replayed_runs (`Sequence[ObservedRun]`, *optional*): trainings of the linearized model.

    Raises:
        `EstimationError`: for runs without a known task or loss.
    """
    evidence = "observed_runs" if observed_runs else "replay" if replayed_runs else "validation_loss"
    if evidence != "validation_loss":
        mixtures, truth = losses_of(observed_runs or replayed_runs, task_names)

        def criterion(loss: np.ndarray) -> float:
            return float(np.nanmean(np.abs(loss - truth) / np.maximum(truth, _MIN_LOSS)))
    else:
        size = len(task_names)
        mixtures = np.concatenate([np.eye(size), np.ones((1, size))])

        def criterion(loss: np.ndarray) -> float:
            return float((np.diag(loss[:-1]).mean() + loss[-1].mean()) / 2)

    def evaluate(scale: float) -> float:
        return criterion(predict_loss(mixtures, scale))

    values = [evaluate(scale) for scale in _GRID]
    best = int(np.argmin(values))
    if best in (0, len(_GRID) - 1):
        logger.warning(
            "The fitted penalty constant is at the edge of its search range (c = %.3g), so predicted losses are not "
            "reliable. Pass the losses of a fine-tuning as an ObservedRun.",
            _GRID[best],
        )
    low, high = np.log(_GRID[max(best - 1, 0)]), np.log(_GRID[min(best + 1, len(_GRID) - 1)])
    refined = minimize_scalar(lambda log_scale: evaluate(np.exp(log_scale)), bounds=(low, high), method="bounded")
    value, scale = min((float(refined.fun), float(np.exp(refined.x))), (values[best], float(_GRID[best])))
    return Regularization(scale, evidence, value)
