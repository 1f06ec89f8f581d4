"""A trainer's arguments as the recipe that an estimate replays."""

import math
from typing import Any

import numpy as np
import torch
from transformers import SchedulerType, get_scheduler

from ..capture import Preconditioner
from ..estimate import TrainingRecipe
from ..estimate.mixtures import epoch_length, mixture_weights
from ..store import GradientStore
from ..tasks import TASK


def training_recipe(trainer: Any, store: GradientStore) -> TrainingRecipe | None:
    """The recipe of a training on all tasks.

    Args:
        trainer (`StagesMixin`): a trainer over several tasks.
        store (`GradientStore`): its preconditioner says in which metric the steps are gradient steps.

    Returns:
        `TrainingRecipe`: or `None` for features without the preconditioner that the optimizer asks for, whose steps
        nobody can tell.
    """
    scales = store.preconditioner()
    if (scales is None) != (trainer.args.optimizer_metric() == "none"):
        return None
    num_moving = None
    if scales is not None:
        num_moving = Preconditioner({name: torch.from_numpy(scale) for name, scale in scales.items()}).num_moving()
    return TrainingRecipe(*learning_rates(trainer), num_moving)


def learning_rates(trainer: Any) -> tuple[list[float], int]:
    """Of every step of a training on all tasks, by transformers' own schedule, and the rows of a step.

    A schedule that depends on what the training finds is taken as constant.
    """
    args, names = trainer.args, list(trainer.tasks.names)
    tasks = np.array(trainer.train_dataset[TASK])
    counts = np.array([(tasks == name).sum() for name in names])
    rows = float(epoch_length(mixture_weights(trainer.tasks.sampling_weights, names), counts))
    loader_batch = args.train_batch_size * args.world_size
    steps = args.max_steps
    if steps <= 0:
        steps_of_epoch = math.ceil(math.ceil(rows / loader_batch) / args.gradient_accumulation_steps)
        steps = math.ceil(steps_of_epoch * args.num_train_epochs)
    batch_size = loader_batch * args.gradient_accumulation_steps
    if args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        return [args.learning_rate] * steps, batch_size
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=args.learning_rate)
    scheduler = get_scheduler(
        args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, args.lr_scheduler_kwargs
    )
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates, batch_size
