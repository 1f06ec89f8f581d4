"""Subsets and mixtures of tasks as arrays, and what a row counts in them."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .._settings import check_number, check_one_of, checked_names
from ..errors import EstimationError
from ..store import FeatureTable
from ..tasks.sampling import LOSS_WEIGHTINGS


def mixture_weights(tasks: Iterable[str] | Mapping[str, float], task_names: Sequence[str]) -> np.ndarray:
    """Convert a subset of names, or a dict from name to weight, to an array of weights `(T,)`.

    Raises:
        `EstimationError`: for unknown and repeated tasks, and weights that are no numbers.
    """
    names = checked_names("tasks", tasks, task_names, EstimationError)
    weights = tasks if isinstance(tasks, Mapping) else dict.fromkeys(names, 1.0)
    for name, weight in weights.items():
        check_number(f"The weight of {name!r}", weight, error=EstimationError)
    return np.array([weights.get(name, 0.0) for name in task_names])


def checked_mixtures(mixtures: np.ndarray, num_tasks: int) -> np.ndarray:
    """Mixtures as an array of float64, `(S, T)`; a single one may be `(T,)`.

    Raises:
        `EstimationError`: for another number of tasks, and for weights that are no numbers or not finite.
    """
    try:
        found = np.atleast_2d(np.asarray(mixtures, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise EstimationError(f"Expected mixtures as an array of numbers, found {mixtures!r:.80}.") from error
    if found.shape[1] != num_tasks:
        raise EstimationError(f"Expected mixtures over {num_tasks} tasks, found shape {found.shape}.")
    if not np.isfinite(found).all():
        raise EstimationError("Expected finite mixture weights, found NaN or infinity.")
    return found


def loss_weights(train: FeatureTable, task_loss_weighting: str, sampling_weights: np.ndarray) -> np.ndarray:
    """Weight of each training row's loss in a step, `(n,)`, with mean 1 over all rows that these stand for.

    transformers and trl average a step's loss over tokens. With any other weighting than "tokens" it is the mean of the
    tasks' means, so that a task counts as much however many tokens it has and however often its rows are drawn. This
    takes every task to be in every step.

    Args:
        train (`FeatureTable`): the training rows.
        task_loss_weighting (`str`): as of the trainers.
        sampling_weights (`np.ndarray` of shape `(T,)`): weight that each task's rows are drawn by.

    Raises:
        `EstimationError`: for an unknown weighting.
    """
    check_one_of("task_loss_weighting", task_loss_weighting, LOSS_WEIGHTINGS, EstimationError)
    tokens = np.ones(len(train)) if train.num_tokens is None else train.num_tokens
    of_task = train.rows_per_captured
    if task_loss_weighting != "tokens":
        totals = np.bincount(train.task, tokens, len(sampling_weights)) * of_task
        tokens = tokens / (totals * sampling_weights)[train.task]
    if train.task_sizes is None:
        return tokens / tokens.mean()
    return tokens / np.average(tokens, weights=of_task[train.task])
