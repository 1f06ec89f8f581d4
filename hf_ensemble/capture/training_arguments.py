"""A trainer's arguments as the recipe that an estimate replays."""

import torch
from peft.tuners.lora import LoraLayer
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


def fresh_lora_gain(model: torch.nn.Module) -> float:
    """How much A's response to an input grows per unit that all of its entries move along the input's signs.

    With n inputs the response grows by |x|_1, about sqrt(n) |x|, and is rms(A) |x| at the start: sqrt(n) / rms(A), the
    mean over the adapted layers by the size of their B. Layers whose B is not zero are beyond that start; where they
    are all, and where there is no LoRA, this is 0.

    Args:
        model (`torch.nn.Module`): a model with its adapter, at the linearisation point.
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
