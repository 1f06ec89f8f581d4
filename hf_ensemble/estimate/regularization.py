"""Fits the constant of the surrogate's penalty."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, isnan
from typing import Literal

import numpy as np
from scipy.optimize import minimize_scalar

from .._settings import check_number, checked_mapping
from ..errors import EstimationError
from ..logging import get_logger
from .mixtures import mixture_weights

# Values of c are 10 ** (step / 4): those of the first steps, then more for as long as the last one is the best, up to a
# limit. A training that goes through a small part of a million rows has a c far above that of one through a thousand.
_PER_DECADE = 4
_FIRST_STEPS, _LAST_STEP = range(-12, 13), 36
# Losses are divided by at least this.
_MIN_LOSS = 1e-12

logger = get_logger(__name__)


@dataclass(frozen=True)
class ObservedRun:
    """A fine-tuning with known validation losses.

    Args:
        mixture (`dict[str, float]`): weight of each task's rows in training.
        losses (`dict[str, float]`): mean validation loss of each evaluated task; NaN where it is unknown.
        captured_losses (`dict[str, float]`, *optional*):
            The same over the captured rows, of tasks whose validation rows were not all captured. Predictions are
            calibrated by these, and predicted losses are then multiplied by the ratio of both.

    Raises:
        `EstimationError`: for weights and losses that are no numbers, or negative, and for a mixture without a task.
    """

    mixture: Mapping[str, float]
    losses: Mapping[str, float]
    captured_losses: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        for name, weight in checked_mapping("the mixture of an observed run", self.mixture, EstimationError).items():
            check_number(f"The weight of {name!r} in an observed run", weight, 0, error=EstimationError)
        if not any(self.mixture.values()):
            raise EstimationError(f"Expected an observed run on at least one task, found the mixture {self.mixture}.")
        for argument in ("losses", "captured_losses"):
            where = f"the {argument} of an observed run"
            for name, loss in checked_mapping(where, getattr(self, argument), EstimationError).items():
                if not (isinstance(loss, float) and isnan(loss)):
                    check_number(f"The loss of {name!r} in {where}", loss, 0, error=EstimationError)

    def tasks_with_level(self) -> set[str]:
        """Tasks whose losses over all validation rows and over the captured ones are both known."""
        whole, captured = (
            {name for name, loss in losses.items() if isfinite(loss)} for losses in (self.losses, self.captured_losses)
        )
        return whole & captured

    def as_dict(self) -> dict[str, dict[str, float]]:
        """The arguments as JSON values; unknown losses are left out."""
        known = {
            name: {task: value for task, value in getattr(self, name).items() if isfinite(value)}
            for name in ("mixture", "losses", "captured_losses")
        }
        return {name: values for name, values in known.items() if values or name != "captured_losses"}


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


def losses_of(
    runs: Sequence[ObservedRun], task_names: Sequence[str], of_captured: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Mixtures and losses of runs, both `(S, T)`; unknown losses are NaN.

    Args:
        runs (`Sequence[ObservedRun]`): fine-tunings with known losses.
        task_names (`Sequence[str]`): task names.
        of_captured (`bool`, *optional*, defaults to `False`):
            Whether losses are those of the captured validation rows, where a run has them.

    Raises:
        `EstimationError`: for runs without a known task or a finite loss.
    """
    mixtures = np.array([mixture_weights(run.mixture, task_names) for run in runs])
    whole, captured = (
        np.array([[own.get(name, np.nan) for name in task_names] for own in known], dtype=np.float64)
        for known in ([run.losses for run in runs], [run.captured_losses for run in runs])
    )
    losses = np.where(np.isfinite(captured), captured, whole) if of_captured else whole
    if not np.isfinite(losses).any():
        raise EstimationError(
            f"Expected observed runs with a finite loss of the tasks {list(task_names)}, found no finite loss of them."
        )
    return mixtures, losses


def choose_regularization(
    predict_loss: Callable[[np.ndarray, float], np.ndarray],
    rough_loss: Callable[[np.ndarray, float], np.ndarray],
    task_names: Sequence[str],
    observed_runs: Sequence[ObservedRun] = (),
    replayed_runs: Sequence[ObservedRun] = (),
    accuracy: float = 1e-5,
) -> Regularization:
    """Fit c.

    With observed or else replayed runs, c minimizes the mean relative error of their predicted losses, so that the
    surrogate moves as far as training does. Without runs, c minimizes the predicted validation loss over every task
    alone and all tasks together, as if the length of training were optimal for the data, which it rarely is.

    Args:
        predict_loss (`Callable`): maps mixtures `(S, T)` and a candidate c to predicted losses `(S, T)`.
        rough_loss (`Callable`): the same at less expense, to find about where c is.
        task_names (`Sequence[str]`): task names.
        observed_runs (`Sequence[ObservedRun]`, *optional*): fine-tunings with known losses.
        replayed_runs (`Sequence[ObservedRun]`, *optional*): trainings of the linearized model.
        accuracy (`float`, *optional*, defaults to 1e-5): of log(c).

    Raises:
        `EstimationError`: for runs without a known task or loss.
    """
    evidence = "observed_runs" if observed_runs else "replay" if replayed_runs else "validation_loss"
    if evidence != "validation_loss":
        mixtures, truth = losses_of(observed_runs or replayed_runs, task_names, of_captured=True)

        def criterion(loss: np.ndarray) -> float:
            return float(np.nanmean(np.abs(loss - truth) / np.maximum(truth, _MIN_LOSS)))
    else:
        size = len(task_names)
        mixtures = np.concatenate([np.eye(size), np.ones((1, size))])

        def criterion(loss: np.ndarray) -> float:
            return float((np.diag(loss[:-1]).mean() + loss[-1].mean()) / 2)

    def evaluate(scale: float) -> float:
        return criterion(predict_loss(mixtures, scale))

    roughly = _over_range(lambda scale: criterion(rough_loss(mixtures, scale)))
    values = _descended(evaluate, min(roughly, key=roughly.__getitem__))
    best = min(values, key=values.__getitem__)
    if best in (min(values), max(values)):
        logger.warning(
            "The fitted penalty constant is at the edge of its search range (c = %.3g), so predicted losses are not "
            "reliable. Pass the losses of a fine-tuning as an ObservedRun.",
            _scale_at(best),
        )
    low, high = (np.log(_scale_at(np.clip(step, min(values), max(values)))) for step in (best - 1, best + 1))
    refined = minimize_scalar(
        lambda log_scale: evaluate(np.exp(log_scale)), bounds=(low, high), method="bounded", options={"xatol": accuracy}
    )
    value, scale = min((float(refined.fun), float(np.exp(refined.x))), (values[best], _scale_at(best)))
    return Regularization(scale, evidence, value)


def _over_range(evaluate: Callable[[float], float]) -> dict[int, float]:
    """Values by step over the whole range, which goes on for as long as its last step is the best."""
    values = {step: evaluate(_scale_at(step)) for step in _FIRST_STEPS}
    while (best := min(values, key=values.__getitem__)) == max(values) < _LAST_STEP:
        values |= {step: evaluate(_scale_at(step)) for step in range(best + 1, best + 1 + _PER_DECADE)}
    return values


def _descended(evaluate: Callable[[float], float], start: int) -> dict[int, float]:
    """Values by step, downhill from a step to one whose neighbours are higher, or the end of the range."""
    best, values = start, {start: evaluate(_scale_at(start))}
    while True:
        for step in (best - 1, best + 1):
            if step not in values and _FIRST_STEPS[0] <= step <= _LAST_STEP:
                values[step] = evaluate(_scale_at(step))
        lowest = min(values, key=values.__getitem__)
        if lowest == best:
            return values
        best = lowest


def _scale_at(step: int) -> float:
    return float(10.0 ** (step / _PER_DECADE))
