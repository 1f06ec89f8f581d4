"""A trainer's arguments as the recipe that an estimate replays."""

import numpy as np
import torch
from transformers import SchedulerType, TrainingArguments, get_scheduler

from ..store import TrainingRecipe

# Stretches that the steps of a long training are put together to.
_STRETCHES = 200


def optimizer_metric(args: TrainingArguments) -> str:
    """The preconditioner in which the optimizer's steps are gradient steps: `"none"` of SGD, `"adam"` of all others."""
    return "none" if getattr(args.optim, "value", args.optim) == "sgd" else "adam"


def training_recipe(args: TrainingArguments, num_steps: int) -> TrainingRecipe:
    """What the arguments make of a training of `num_steps` optimizer steps; how many parameters move is not in it."""
    rates = np.array_split(learning_rates(args, num_steps), min(num_steps, _STRETCHES))
    batch_size = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    return TrainingRecipe([float(stretch.sum()) for stretch in rates], batch_size, fixed_steps=args.max_steps > 0)


def learning_rates(args: TrainingArguments, num_steps: int) -> list[float]:
    """Of every step, by transformers' own schedule; constant where that depends on what the training finds."""
    if args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        return [args.learning_rate] * num_steps
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=args.learning_rate)
    scheduler = get_scheduler(
        args.lr_scheduler_type, optimizer, args.get_warmup_steps(num_steps), num_steps, args.lr_scheduler_kwargs
    )
    rates = []
    for _ in range(num_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates
