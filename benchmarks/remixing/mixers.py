"""The ways to set the shares of the tasks that are compared."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import concatenate_datasets

from hf_ensemble.capture import capture_gradients, training_recipe
from hf_ensemble.capture.capture_pass import MOMENT_ROWS
from hf_ensemble.capture.training_arguments import learning_rates
from hf_ensemble.select import DataSelector
from hf_ensemble.store import TrainingRecipe

from .training import AdapterTrainer, Step

# Rows of one task that ODM draws at once: its reward is their mean loss.
MICRO_BATCH = 4


class FixedShares:
    """Tasks take turns in proportion to their shares, so that every batch has them as nearly as it can.

    Args:
        shares (`np.ndarray` of shape `(T,)`): share of the drawn rows that each task gets.
        extra_rows (`float`, *optional*, defaults to 0.0): what it took to find them.
    """

    def __init__(self, shares: np.ndarray, extra_rows: float = 0.0):
        self.shares = np.asarray(shares, dtype=np.float64)
        self.extra_rows = extra_rows
        self.history: list[list[float]] = []
        self._credit = np.zeros(len(self.shares))

    def begin_epoch(self, first_step: int) -> None:
        self.history.append(self.shares.tolist())

    def draw(self, count: int) -> np.ndarray:
        found = np.empty(count, dtype=np.int64)
        for position in range(count):
            self._credit += self.shares
            found[position] = self._credit.argmax()
            self._credit[found[position]] -= 1
        return found

    def task_losses(self, step: Step) -> np.ndarray | None:
        return None


class GradientMixture(FixedShares):
    """The mixture with the least predicted loss of the targets for the steps that are left, from fresh gradients.

    Args:
        trainer (`AdapterTrainer`): the training; gradients are captured at its parameters as they are.
        targets (`Sequence[str]`, *optional*): tasks whose mean loss counts; all by default.
        num_epochs (`int`): of the training.
        folder (`Path`): of the stores.
        every_epoch (`bool`): whether the mixture is solved anew before every epoch, or once before the first.
    """

    def __init__(
        self,
        trainer: AdapterTrainer,
        targets: Sequence[str] | None,
        num_epochs: int,
        folder: Path,
        every_epoch: bool,
    ):
        super().__init__(proportional_shares(trainer))
        self.trainer, self.targets, self.folder, self.every_epoch = trainer, targets, folder, every_epoch
        num_steps = num_epochs * trainer.epoch_steps
        self._rates = learning_rates(trainer.context.args, num_steps)

    def begin_epoch(self, first_step: int) -> None:
        if self.every_epoch or first_step == 0:
            self.shares = self._solved(first_step)
        super().begin_epoch(first_step)

    def _solved(self, first_step: int) -> np.ndarray:
        context, names = self.trainer.context, self.trainer.names
        config = context.args.capture_config()
        # Another sample each time.
        config.capture_seed += first_step
        tables = [context.eval_tables[name] for name in names]
        recipe = training_recipe(context.args, len(self._rates))
        left = TrainingRecipe(self._rates[first_step:], recipe.batch_size, fixed_steps=True)
        store = capture_gradients(
            context.model,
            context.tasks,
            config,
            self.folder / str(first_step),
            data_collator=context.data_collator,
            encoded={"train": self.trainer.table, "validation": concatenate_datasets(tables)},
            disable_tqdm=True,
            recipe=left,
        )
        moments = min(MOMENT_ROWS, len(self.trainer.table))
        self.extra_rows += sum(store.num_rows(split) for split in ("train", "validation")) + moments
        selector = DataSelector.from_store(store, num_components=context.args.num_components)
        found = selector.mixture(self.targets).probabilities
        return np.array([found.get(name, 0.0) for name in names])


class OnlineDataMixing(FixedShares):
    """ODM (arXiv 2312.02406): Exp3 whose rewards are the tasks' training losses.

    Args:
        trainer (`AdapterTrainer`): the training.
        seed (`int`): of the tasks that are drawn.
        smoothing (`float`, *optional*, defaults to 0.9): of the rewards' moving averages.
    """

    def __init__(self, trainer: AdapterTrainer, seed: int, smoothing: float = 0.9):
        super().__init__(proportional_shares(trainer))
        self.smoothing = smoothing
        self._generator = np.random.default_rng(seed)
        self._rewards = np.zeros(len(self.shares))
        self._turn = 1

    def draw(self, count: int) -> np.ndarray:
        drawn = self._generator.choice(len(self.shares), size=-(-count // MICRO_BATCH), p=self.shares)
        return np.repeat(drawn, MICRO_BATCH)[:count]

    def task_losses(self, step: Step) -> np.ndarray | None:
        for start in range(0, len(step.tasks), MICRO_BATCH):
            task, loss = step.tasks[start], step.losses[start : start + MICRO_BATCH].mean()
            reward = loss / self.shares[task]
            self._rewards[task] = self.smoothing * self._rewards[task] + (1 - self.smoothing) * reward
        before, self._turn = self._exploration(self._turn), self._turn + 1
        floor, count = self._exploration(self._turn), len(self.shares)
        scaled = np.exp(before * (self._rewards - self._rewards.max()))
        self.shares = (1 - count * floor) * scaled / scaled.sum() + floor
        return None

    def _exploration(self, turn: int) -> float:
        count = len(self.shares)
        return min(1 / count, float(np.sqrt(np.log(count) / (count * turn))))


class DoReMiProxy(FixedShares):
    """The proxy training of DoReMi (arXiv 2305.10429): group DRO on the excess loss over a reference.

    Args:
        trainer (`AdapterTrainer`): the training.
        reference (`np.ndarray`): loss of each training row under the reference.
        rate (`float`, *optional*, defaults to 1.0): step size of the tasks' weights.
        smoothing (`float`, *optional*, defaults to 1e-3): share of the uniform weights.

    Attributes:
        mean_weights (`np.ndarray` of shape `(T,)`): mean weights over the steps, the shares that DoReMi trains with.
    """

    def __init__(self, trainer: AdapterTrainer, reference: np.ndarray, rate: float = 1.0, smoothing: float = 1e-3):
        super().__init__(proportional_shares(trainer))
        self.reference, self.rate, self.smoothing = reference, rate, smoothing
        self._weights = np.full(len(self.shares), 1 / len(self.shares))
        self._sum, self._steps = np.zeros(len(self.shares)), 0

    @property
    def mean_weights(self) -> np.ndarray:
        return self._sum / self._steps

    def task_losses(self, step: Step) -> np.ndarray | None:
        size = len(self.shares)
        excess = np.maximum(step.losses - self.reference[step.rows], 0)
        counts = np.bincount(step.tasks, minlength=size)
        means = np.bincount(step.tasks, excess, size) / np.maximum(counts, 1)
        weights = self._weights * np.exp(self.rate * means)
        self._weights = (1 - self.smoothing) * weights / weights.sum() + self.smoothing / size
        self._sum, self._steps = self._sum + self._weights, self._steps + 1
        return self._weights


def proportional_shares(trainer: AdapterTrainer) -> np.ndarray:
    counts = np.array([len(rows) for rows in trainer.rows_of])
    return counts / counts.sum()
