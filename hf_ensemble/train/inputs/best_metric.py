"""The metric that a training's length or learning rates follow: of one task, or the mean over the training's tasks."""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import EarlyStoppingCallback, SchedulerType, Trainer, TrainingArguments
from trl import SFTTrainer

from ...errors import ConfigurationError
from ...logging import get_logger

logger = get_logger(__name__)

_PREFIX = "eval_"
# What trainers evaluate without `compute_metrics`.
_OF_EVERY_TRAINER = ("loss",)
_OF_SFT = ("mean_token_accuracy", "entropy")
# What a user's class overrides to evaluate something else.
_EVALUATING = ("evaluate", "evaluation_loop", "prediction_loop", "log")
_LIBRARIES = (__name__.split(".")[0], "transformers", "trl", "builtins", "typing")


def follows_metric(args: TrainingArguments, callbacks: Iterable[Any] = ()) -> str | None:
    """What makes trainings follow `metric_for_best_model`, as messages name it; `None` where nothing does."""
    if args.load_best_model_at_end:
        return "load_best_model_at_end=True"
    if args.save_strategy == "best":
        return "save_strategy='best'"
    if args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        return f"lr_scheduler_type={args.lr_scheduler_type.value!r}"
    kinds = (own if isinstance(own, type) else type(own) for own in callbacks)
    # A subclass that begins in a way of its own may follow something else.
    begins = EarlyStoppingCallback.on_train_begin
    return next((kind.__name__ for kind in kinds if getattr(kind, "on_train_begin", None) is begins), None)


def check_best_metric(
    args: TrainingArguments,
    task_names: Sequence[str],
    trainer_class: type[Trainer],
    computes_metrics: bool,
    callbacks: Iterable[Any] = (),
) -> None:
    """Refuse what follows the evaluations of a training where there are none, or none of its metric.

    Args:
        args (`TrainingArguments`): the trainer's arguments.
        task_names (`Sequence[str]`): the tasks of the run.
        trainer_class (`type[Trainer]`): the user's class.
        computes_metrics (`bool`): whether there are metrics beside the parents', whose names nobody knows yet.
        callbacks (`Iterable`, *optional*): callbacks, or their classes.

    Raises:
        `ConfigurationError`: which names the argument, or the callback.
    """
    follower = follows_metric(args, callbacks)
    if follower is None:
        return
    if args.eval_strategy == "no":
        raise ConfigurationError(
            f"{follower} cannot be honoured in a run of several trainings: with eval_strategy='no' no training is "
            "evaluated. Please set eval_strategy to 'steps' or 'epoch'."
        )
    name = args.metric_for_best_model
    if name is None:
        raise ConfigurationError(
            f"{follower} cannot be honoured in a run of several trainings: metric_for_best_model is missing. Please "
            "set it to 'loss', the mean over a training's tasks, or to 'eval_TASK_loss'."
        )
    task, metric = split_metric(name, task_names)
    known = _OF_EVERY_TRAINER + (_OF_SFT if issubclass(trainer_class, SFTTrainer) else ())
    if metric not in known and not computes_metrics and not _evaluates_otherwise(trainer_class):
        raise ConfigurationError(
            f"metric_for_best_model={name!r} cannot be honoured in a run of several trainings: no evaluation gives "
            f"this metric. Please set it to one of {list(known)}, the means over a training's tasks, to "
            f"'eval_TASK_loss' with one of the tasks {list(task_names)!s:.200}, or pass compute_metrics."
        )
    if task is not None and len(task_names) > 1:
        logger.warning(
            "metric_for_best_model=%r is of the task %r: trainings without this task follow %r, the mean over their "
            "own tasks.",
            name,
            task,
            _PREFIX + metric,
        )
    if args.load_best_model_at_end:
        logger.info(
            "load_best_model_at_end=True: the validation rows choose how long each training is, which is recorded as "
            "best_step. Losses on these rows are then lower than on new ones."
        )
        if not (args.calibration_runs or getattr(args, "train_baseline", False)):
            logger.warning(
                "Predictions are of trainings to their last step, since no fine-tuning calibrates them, while "
                "load_best_model_at_end=True keeps earlier adapters. Set calibration_runs=1 for predictions of what is "
                "kept."
            )


def _evaluates_otherwise(trainer_class: type[Trainer]) -> bool:
    """Whether a class of the user's evaluates in a way of its own."""
    own = [kind for kind in trainer_class.__mro__ if kind.__module__.split(".")[0] not in _LIBRARIES]
    return any(name in vars(kind) for kind in own for name in _EVALUATING)


def split_metric(name: str, task_names: Iterable[str]) -> tuple[str | None, str]:
    """The task that a metric is of, if it is one's, and the metric's name without prefix and task."""
    metric = name.removeprefix(_PREFIX)
    # The longest first: one task's name may begin with another's.
    for task in sorted(task_names, key=len, reverse=True):
        if metric.startswith(f"{task}_"):
            return task, metric.removeprefix(f"{task}_")
    return None, metric


def metric_of_training(name: str | None, task_names: Iterable[str], own_tasks: Iterable[str]) -> str | None:
    """The metric that a training on some of the tasks follows, as its evaluations name it.

    Args:
        name (`str`, *optional*): `metric_for_best_model` of the run.
        task_names (`Iterable[str]`): the tasks of the run.
        own_tasks (`Iterable[str]`): those of the training.
    """
    if name is None:
        return None
    task, metric = split_metric(name, task_names)
    return _PREFIX + (f"{task}_{metric}" if task in set(own_tasks) else metric)
