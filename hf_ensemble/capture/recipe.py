"""A trainer's arguments as the recipe that an estimate replays."""

import torch
from transformers import SchedulerType, TrainingArguments, get_scheduler

from ..store import TrainingRecipe

_PLAIN_GRADIENT_DESCENT = ("sgd", "schedule_free_sgd", "lomo")


def optimizer_metric(args: TrainingArguments) -> str:
    """The preconditioner in which the optimizer's steps are gradient steps: `"none"` of SGD, `"adam"` of all others."""
    return "none" if _optimizer(args) in _PLAIN_GRADIENT_DESCENT else "adam"


def training_recipe(args: TrainingArguments, num_steps: int) -> TrainingRecipe | None:
    """What the arguments make of a training of `num_steps` optimizer steps; how many parameters move is not in it.

    Returns:
        `TrainingRecipe`: or `None` where nothing can be replayed: an optimizer that is neither of Adam's kind nor plain
        gradient descent, or a learning rate that is zero throughout.
    """
    known = "adam" in _optimizer(args) or _optimizer(args) in _PLAIN_GRADIENT_DESCENT
    rates = learning_rates(args, num_steps)
    if not known or not any(rates):
        return None
    batch_size = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    return TrainingRecipe(rates, batch_size, fixed_steps=args.max_steps > 0)


def _optimizer(args: TrainingArguments) -> str:
    return str(getattr(args.optim, "value", args.optim))


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
