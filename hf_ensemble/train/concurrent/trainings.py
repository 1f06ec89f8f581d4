"""Trainings of several adapters at once, each by a trainer and on a model of its own, over one base."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from transformers import Trainer

from ..flows.adapter_training import AdapterTraining
from ..model_state import ModelState
from .copies import sharing_frozen
from .turns import Turn, Turns

T = TypeVar("T")


def run_concurrently(
    training: AdapterTraining, jobs: Sequence[Callable[[AdapterTraining], T]], num_at_once: int
) -> list[T]:
    """Train several adapters at once, in passes through the base model that they share.

    Each training is what it would be alone: a trainer with its own rows, optimizer, schedule, clipping, callbacks and
    checkpoints. Where one fails the others end where they are; made again, they go on from their checkpoints.

    Args:
        training (`AdapterTraining`): of the model, which stays at theta0.
        jobs (`Sequence[Callable]`): each trains with what it is passed, which trains a copy of the model.
        num_at_once (`int`): trainings that have begun and not ended, at most.
    """
    # A copy is made of the model as no trainer has prepared it.
    with training.context.model_state.restored():
        return Turns(num_at_once, training.context.args.seed).run([partial(_in_turn, training, job) for job in jobs])


def _in_turn(training: AdapterTraining, job: Callable[[AdapterTraining], T], turn: Turn) -> T:
    context = training.context
    model = sharing_frozen(context.model)
    turn.share_backbone(model)

    def make_trainer(*args: Any, **kwargs: Any) -> Trainer:
        trainer = context.make_trainer(*args, model=model, **kwargs)
        turn.share_backward(trainer)
        return trainer

    own = replace(context, model=model, model_state=ModelState(model), make_trainer=make_trainer)
    return job(training.beside(own))
