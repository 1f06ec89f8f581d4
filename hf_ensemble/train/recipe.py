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
    args, names = trainer.args, list(trainer.tasks.names)
    tasks = np.array(trainer.train_dataset[TASK])
    counts = np.array([(tasks == name).sum() for name in names])
    rows = float(epoch_length(mixture_weights(trainer.tasks.sampling_weights, names), counts))
    loader_batch = args.train_batch_size * args.world_size
    steps = args.max_steps
    if steps <= 0:
        steps = math.ceil(math.ceil(rows / loader_batch) / args.gradient_accumulation_steps * args.num_train_epochs)
    num_moving = None
    if scales is not None:
        num_moving = Preconditioner({name: torch.from_numpy(scale) for name, scale in scales.items()}).num_moving()
    return TrainingRecipe(_learning_rates(args, steps), loader_batch * args.gradient_accumulation_steps, num_moving)


def _learning_rates(args: Any, steps: int) -> list[float]:
    """Of every step, by transformers' own schedule; constant where that depends on what training finds."""
    if args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        return [args.learning_rate] * steps
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=args.learning_rate)
    scheduler = get_scheduler(
        args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, args.lr_scheduler_kwargs
    )
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates
