"""How often each task is drawn and how much its loss counts: from the arguments to the tasks."""

from collections.abc import Callable, Collection, Mapping

from ...errors import ConfigurationError
from ...logging import get_logger
from ...tasks import RowFormat, TaskSet
from ...tasks.sampling import row_weights
from ..configs import RunArguments

logger = get_logger(__name__)


def with_given_weights(tasks: TaskSet, args: RunArguments) -> TaskSet:
    """The tasks with the sampling weights of the arguments, where there are any.

    Raises:
        `ConfigurationError`: for weights of unknown tasks, weights in both places, and a sampling strategy that they do
            not go with.
    """
    if args.sampling_weights:
        unknown = sorted(set(args.sampling_weights) - set(tasks))
        if unknown:
            raise ConfigurationError(f"Unknown tasks in sampling_weights {unknown}; the tasks are {list(tasks)}.")
        if set(tasks.sampling_weights.values()) != {1.0}:
            raise ConfigurationError(
                "Expected sampling weights of the TaskSet or in the arguments, found both: "
                f"{tasks.sampling_weights} and {args.sampling_weights}. Leave one of them out."
            )
        tasks = tasks.reweighted(args.sampling_weights)
    args.check_order(len(set(tasks.sampling_weights.values())) > 1)
    return tasks


def drawn_by(tasks: TaskSet, args: RunArguments, counts: Callable[[], Mapping[str, int]]) -> TaskSet:
    """The tasks with the weight that a training draws their rows by, `task_sampling` and given weights in one.

    Args:
        tasks (`TaskSet`): the tasks, with given weights.
        args (`RunArguments`): the trainer's arguments.
        counts (`Callable`): number of rows of each task that a training draws from.
    """
    if args.task_sampling == "proportional" or any(task.is_streamed for task in tasks.values()):
        # Nobody knows how many rows a stream has: its weight is one of a draw already.
        return tasks
    weights = row_weights(args.task_sampling, counts(), tasks.sampling_weights, args.sampling_temperature)
    logger.info("task_sampling=%r draws a row of each task with the weight %s.", args.task_sampling, weights)
    return tasks.reweighted(weights)


def check_loss_weighting(
    args: RunArguments, tasks: TaskSet, compute_loss_func: Callable | None, evaluated: Collection[str], is_sft: bool
) -> None:
    """Refuse arguments that losses by task cannot be weighted with.

    Args:
        args (`RunArguments`): the trainer's arguments.
        tasks (`TaskSet`): the tasks.
        compute_loss_func (`Callable`, *optional*): the user's own loss.
        evaluated (`Collection[str]`): names of the evaluation datasets.
        is_sft (`bool`): whether the trainer is trl's.

    Raises:
        `ConfigurationError`: which names the argument.
    """
    weighting = args.task_loss_weighting
    if weighting == "tokens":
        return
    fused = args.use_liger_kernel and not is_sft and tasks.row_format is not RowFormat.CLASSIFICATION
    reasons = {
        "compute_loss_func": compute_loss_func is not None and "its loss is not one of single tokens",
        "label_smoothing_factor": args.label_smoothing_factor > 0 and "its loss is not one of single tokens",
        "use_liger_kernel": fused and "its fused loss does not give those of single tokens",
        "parallelism_config": getattr(args, "parallelism_config", None) and "tokens of a row lie on several devices",
    }
    for name, reason in reasons.items():
        if reason:
            raise ConfigurationError(
                f"task_loss_weighting={weighting!r} weighs the losses of tokens by their task, but {name} is given: "
                f"{reason}. Leave one of them out."
            )
    if weighting == "convergence":
        lacking = [name for name in tasks if name not in evaluated]
        strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
        if strategy == "no" or lacking:
            raise ConfigurationError(
                "task_loss_weighting='convergence' weighs tasks by their evaluation losses in a training: expected "
                f"eval_strategy='steps' or 'epoch', found {strategy!r}, and evaluation rows of every task, lacking are "
                f"those of {lacking}. Set eval_strategy, pass eval_dataset by task, or use task_loss_weighting='tasks'."
            )
        logger.warning(
            "task_loss_weighting='convergence': the weights of tasks change during a training by their evaluation "
            "losses. Predictions are of trainings whose weights stay equal, as with 'tasks'."
        )
