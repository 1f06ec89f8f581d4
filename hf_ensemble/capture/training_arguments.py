"""Derives the preconditioner and the training recipe from a trainer's arguments."""

import torch
from peft.tuners.lora import LoraLayer
from transformers import SchedulerType, TrainingArguments, get_scheduler

from ..store import TrainingRecipe

_PLAIN_GRADIENT_DESCENT = ("sgd", "schedule_free_sgd", "lomo")


def optimizer_preconditioner(args: TrainingArguments) -> str:
    """The preconditioner that matches the optimizer: `"none"` for SGD, `"adam"` for all others."""
    return "none" if _optimizer(args) in _PLAIN_GRADIENT_DESCENT else "adam"


def training_recipe(args: TrainingArguments, num_steps: int) -> TrainingRecipe | None:
    """The recipe of a training of `num_steps` optimizer steps, without the number of parameters.

    Returns:
        `TrainingRecipe`: or `None` if the training cannot be replayed: for optimizers that are neither related to Adam
        nor plain gradient descent, and for learning rates that are all zero.
    """
    known = "adam" in _optimizer(args) or _optimizer(args) in _PLAIN_GRADIENT_DESCENT
    rates = learning_rates(args, num_steps)
    if not known or not any(rates):
        return None
    batch_size = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    return TrainingRecipe(rates, batch_size, fixed_steps=args.max_steps > 0)


def fresh_lora_gain(model: torch.nn.Module) -> float:
    """Relative growth of a fresh LoRA's A x when every entry of A moves by one unit along the signs of x.

    With n inputs, each output grows by |x|_1, about sqrt(n) |x|, from rms(A) |x|. The gain sqrt(n) / rms(A) is averaged
    over the adapted layers, weighted by the size of B. Layers with a nonzero B count as 0, and so do models without
    LoRA.

    Args:
        model (`torch.nn.Module`): model with its adapter, at the linearization point.
    """
    gain, size = 0.0, 0
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name in layer.active_adapters:
                if name in layer.lora_A and layer.lora_B[name].weight.requires_grad:
                    a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
                    size += b.numel()
                    if not b.any():
                        gain += b.numel() * a[0].numel() ** 0.5 / float(a.float().square().mean().sqrt())
    return gain / size if size else 0.0


def _optimizer(args: TrainingArguments) -> str:
    return str(getattr(args.optim, "value", args.optim))


def learning_rates(args: TrainingArguments, num_steps: int) -> list[float]:
    """Learning rate of every step, from transformers' schedule; constant for schedules that depend on the metrics."""
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
