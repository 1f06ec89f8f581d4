"""Training one adapter on rows of several tasks, whose shares may change at every step."""

from typing import NamedTuple, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import get_scheduler, set_seed

from hf_ensemble.models.answer_scorer import AnswerScorer
from hf_ensemble.tasks import TASK, pop_meta
from hf_ensemble.train.flows.context import FlowContext


class Step(NamedTuple):
    """What a mixer learns of an optimizer step: number of the task and loss of each row, and the rows' positions."""

    tasks: np.ndarray
    losses: np.ndarray
    rows: np.ndarray


class Mixer(Protocol):
    """Says how often the rows of each task are drawn.

    Attributes:
        extra_rows (`float`): rows that went forward and backward besides those that are trained on.
    """

    extra_rows: float

    def begin_epoch(self, first_step: int) -> None:
        """Before the first step of an epoch; the model is as it is then."""

    def draw(self, count: int) -> np.ndarray:
        """Task of each of the next `count` rows, by its number."""

    def task_losses(self, step: Step) -> np.ndarray | None:
        """Weight of each task's mean loss in the step; `None` for the mean over the rows. Called before the update."""


class AdapterTrainer:
    """Trains the active adapter from theta0 with the arguments of a run, in epochs as long as all rows together.

    Args:
        context (`FlowContext`): the run; its model is at theta0.
        seed (`int`): of the order of the rows and of dropout.
    """

    def __init__(self, context: FlowContext, seed: int):
        self.context = context
        self.seed = seed
        self.names = list(context.tasks)
        numbers = {name: number for number, name in enumerate(self.names)}
        self.table: Dataset = context.train_table
        of_rows = np.array([numbers[name] for name in self.table[TASK]])
        self.rows_of = [np.flatnonzero(of_rows == number) for number in range(len(self.names))]
        self.batch_size: int = context.args.per_device_train_batch_size
        self.epoch_steps = -(-len(self.table) // self.batch_size)
        parameters = [(name, own) for name, own in context.model.named_parameters() if own.requires_grad]
        self.parameters = [own for _, own in parameters]
        self._theta0 = [own.detach().clone() for own in self.parameters]
        self._score = AnswerScorer(context.model, context.label_space)

    def train(self, mixer: Mixer, num_epochs: float) -> int:
        """Train from theta0 on; the adapter stays as trained. Returns the number of rows that were drawn."""
        self.load(self._theta0)
        set_seed(self.seed)
        generator = np.random.default_rng(self.seed)
        orders = [Cycle(rows, generator) for rows in self.rows_of]
        args, num_steps = self.context.args, round(num_epochs * self.epoch_steps)
        optimizer = torch.optim.AdamW(self.parameters, args.learning_rate, weight_decay=args.weight_decay)
        schedule = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(num_steps), num_steps)
        for number in range(num_steps):
            if number % self.epoch_steps == 0:
                mixer.begin_epoch(number)
            tasks = mixer.draw(self.batch_size)
            rows = np.array([orders[task].next() for task in tasks])
            losses = self._losses(rows, training=True)
            weights = mixer.task_losses(Step(tasks, losses.detach().double().numpy(), rows))
            self._loss(losses, tasks, weights).backward()
            nn.utils.clip_grad_norm_(self.parameters, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        self.context.model.eval()
        return num_steps * self.batch_size

    def losses(self) -> np.ndarray:
        """Loss of every training row under the adapter as it is."""
        with torch.no_grad():
            starts = range(0, len(self.table), 64)
            parts = [self._losses(np.arange(start, min(start + 64, len(self.table))), False) for start in starts]
        return torch.cat(parts).double().numpy()

    def load(self, parameters: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for own, values in zip(self.parameters, parameters):
                own.copy_(values)

    def _losses(self, rows: np.ndarray, training: bool) -> torch.Tensor:
        inputs = self.context.data_collator([self.table[int(row)] for row in rows])
        meta, labels = pop_meta(inputs), inputs.pop("labels")
        self.context.model.train(training)
        return self._score(inputs, labels, list(meta[TASK])).loss

    @staticmethod
    def _loss(losses: torch.Tensor, tasks: np.ndarray, weights: np.ndarray | None) -> torch.Tensor:
        if weights is None:
            return losses.mean()
        counts = np.bincount(tasks, minlength=len(weights))
        return losses @ torch.from_numpy(weights[tasks] / counts[tasks]).to(losses)


class Cycle:
    """A task's rows, each once in a new order before any is drawn again."""

    def __init__(self, rows: np.ndarray, generator: np.random.Generator):
        self.rows, self.generator = rows, generator
        self._left: list[int] = []

    def next(self) -> int:
        if not self._left:
            self._left = self.generator.permutation(self.rows).tolist()
        return self._left.pop()
