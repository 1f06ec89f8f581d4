"""How strong the surrogate's penalty is: by evidence, not by hand."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import minimize_scalar

from ..errors import EstimationError
from ..logging import get_logger
from .mixtures import mixture_weights

_GRID = np.logspace(-3, 3, 25)

logger = get_logger(__name__)


@dataclass(frozen=True)
class ObservedRun:
    """A true fine-tuning: what it was trained on, and how it did.

    Args:
        mixture (`dict[str, float]`): weight of each task's rows in training.
        losses (`dict[str, float]`): mean validation loss of each task that was evaluated.
    """

    mixture: Mapping[str, float]
    losses: Mapping[str, float]


@dataclass(frozen=True)
class Regularization:
    """The constant c of the penalty and where it comes from.

    Args:
        l2_scale (`float`): c.
        evidence (`str`): `"observed_runs"`, `"replay"` or `"validation_loss"`.
        criterion (`float`): value that c minimises: mean relative error over the runs' losses, or mean predicted loss.
    """

    l2_scale: float
    evidence: Literal["observed_runs", "replay", "validation_loss"]
    criterion: float


def losses_of(runs: Sequence[ObservedRun], task_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mixtures and losses of runs, both `(S, T)`; a loss that is not known is NaN.

    Raises:
        `EstimationError`: for runs without a known task or a finite loss.
    """
    mixtures = np.array([mixture_weights(run.mixture, task_names) for run in runs])
    losses = np.array([[run.losses.get(name, np.nan) for name in task_names] for run in runs], dtype=np.float64)
    if not np.isfinite(losses).any():
        raise EstimationError("The observed runs hold no finite loss of a known task.")
    return mixtures, losses


def choose_regularization(
    predict_loss: Callable[[np.ndarray, float], np.ndarray],
    task_names: Sequence[str],
    observed_runs: Sequence[ObservedRun] = (),
    replayed_runs: Sequence[ObservedRun] = (),
) -> Regularization:
    """Find c.

    With observed runs, or else with replayed ones: the c whose predictions of those runs have the least mean relative
    error, so that the surrogate moves as far as the user's training moves. With neither: the c with the least predicted
    validation loss over all tasks trained alone and all together, as if the user's training length were about right for
    these data, which it seldom is.

    Args:
        predict_loss (`Callable`): from mixtures `(S, T)` and a candidate for c to predicted losses `(S, T)`.
        task_names (`Sequence[str]`): the tasks.
        observed_runs (`Sequence[ObservedRun]`, *optional*): true fine-tunings.
        replayed_runs (`Sequence[ObservedRun]`, *optional*): trainings of the linearised model.

    Raises:
        `EstimationError`: for runs without a known task or loss.
    """
    evidence = "observed_runs" if observed_runs else "replay" if replayed_runs else "validation_loss"
    if evidence != "validation_loss":
        mixtures, truth = losses_of(observed_runs or replayed_runs, task_names)

        def criterion(loss: np.ndarray) -> float:
            return float(np.nanmean(np.abs(loss - truth) / truth))
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
            "The penalty of the estimates lies at the edge of what was tried (c = %.3g): the evidence does not hold "
            "it, and predicted losses are not to be trusted. Give a fine-tuning that exists as an ObservedRun.",
            _GRID[best],
        )
    low, high = np.log(_GRID[max(best - 1, 0)]), np.log(_GRID[min(best + 1, len(_GRID) - 1)])
    refined = minimize_scalar(lambda log_scale: evaluate(np.exp(log_scale)), bounds=(low, high), method="bounded")
    value, scale = min((float(refined.fun), float(np.exp(refined.x))), (values[best], float(_GRID[best])))
    return Regularization(scale, evidence, value)
