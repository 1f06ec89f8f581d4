"""Derives the preconditioner and the training recipe from a trainer's arguments, and the optimizer that it is given."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers import SchedulerType, TrainingArguments, get_scheduler

from ..logging import get_logger
from ..store import TrainingRecipe

logger = get_logger(__name__)

# What trainers take as `optimizer_cls_and_kwargs`, in place of the optimizer and the learning rate of the arguments.
GivenOptimizer = tuple[type[torch.optim.Optimizer], Mapping[str, Any]]

_PLAIN_GRADIENT_DESCENT = ("sgd", "schedule_free_sgd", "lomo")
# Arguments that `Trainer` takes parameters from, which may have rates of their own.
_OF_PARAMETERS = ("params", "model", "optimizer_dict")


def optimizer_preconditioner(args: TrainingArguments, optimizer: GivenOptimizer | None = None) -> str:
    """The preconditioner that matches the optimizer: `"none"` for SGD, `"adam"` for all others.

    Args:
        args (`TrainingArguments`): the trainer's arguments.
        optimizer (`tuple`, *optional*): class and arguments of an optimizer that the trainer is given.
    """
    return "none" if _optimizer(args, optimizer) in _PLAIN_GRADIENT_DESCENT else "adam"


def has_known_steps(args: TrainingArguments, optimizer: GivenOptimizer | None = None) -> bool:
    """Whether the optimizer is related to Adam, or plain gradient descent."""
    name = _optimizer(args, optimizer)
    return "adam" in name or name in _PLAIN_GRADIENT_DESCENT


def training_recipe(
    args: TrainingArguments, num_steps: int, optimizer: GivenOptimizer | None = None
) -> TrainingRecipe | None:
    """The recipe of a training of `num_steps` optimizer steps, without the number of parameters.

    Args:
        args (`TrainingArguments`): the trainer's arguments.
        num_steps (`int`): optimizer steps.
        optimizer (`tuple`, *optional*):
            Class and arguments of an optimizer that the trainer is given. A warning says why one cannot be replayed.

    Returns:
        `TrainingRecipe`: or `None` if the training cannot be replayed: for optimizers that are neither related to Adam
        nor plain gradient descent, and for learning rates that are all zero.
    """
    obstacle = None if optimizer is None else _obstacle(optimizer)
    if obstacle is not None:
        logger.warning(
            "The training cannot be replayed, since %s. Predictions rest on the fine-tunings that calibrate them. "
            "Where transformers has this optimizer, set optim and learning_rate, and do not pass it to the trainer.",
            obstacle,
        )
        return None
    rates = learning_rates(args, num_steps, optimizer)
    if not has_known_steps(args, optimizer) or not any(rates):
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


def learning_rate(args: TrainingArguments, optimizer: GivenOptimizer | None = None) -> float | None:
    """The learning rate that a schedule starts from; `None` where it is not among a given optimizer's arguments."""
    if optimizer is None:
        return args.learning_rate
    kind, options = optimizer
    if "lr" in options:
        return float(options["lr"])
    try:
        default = inspect.signature(kind).parameters["lr"].default
    except (KeyError, TypeError, ValueError):
        return None
    return default if isinstance(default, float) else None


def learning_rates(args: TrainingArguments, num_steps: int, optimizer: GivenOptimizer | None = None) -> list[float]:
    """Learning rate of every step, from transformers' schedule; constant for schedules that depend on the metrics."""
    first = learning_rate(args, optimizer)
    if args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        return [first] * num_steps
    stepped = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=first)
    scheduler = get_scheduler(
        args.lr_scheduler_type, stepped, args.get_warmup_steps(num_steps), num_steps, args.lr_scheduler_kwargs
    )
    rates = []
    for _ in range(num_steps):
        rates.append(scheduler.get_last_lr()[0])
        stepped.step()
        scheduler.step()
    return rates


def _optimizer(args: TrainingArguments, given: GivenOptimizer | None) -> str:
    """The optimizer's name as `optim` has it; of a given class, that of the kind that it is of, or its own."""
    if given is None:
        return str(getattr(args.optim, "value", args.optim))
    kind = given[0]
    names = [own.__name__.lower() for own in getattr(kind, "__mro__", (kind,)) if hasattr(own, "__name__")]
    kinds = [known for name in names for known in ("adam", "sgd") if known in name]
    return next(iter(kinds or [name for name in names if name == "lomo"] or names), type(kind).__name__)


def _obstacle(optimizer: GivenOptimizer) -> str | None:
    """Why a training with a given optimizer cannot be replayed."""
    kind, options = optimizer
    name = getattr(kind, "__name__", str(kind))
    found = _optimizer(None, optimizer)
    if found != "adam" and found not in _PLAIN_GRADIENT_DESCENT:
        return f"{name} is related neither to Adam nor to plain gradient descent"
    if found == "sgd" and options.get("momentum"):
        return f"{name} with momentum={options['momentum']} is no plain gradient descent"
    given = [own for own in _OF_PARAMETERS if own in options]
    if given:
        return f"{given[0]} of {name} may have learning rates of its own"
    if learning_rate(None, optimizer) is None:
        return f"the arguments of {name} have no lr"
    return None
