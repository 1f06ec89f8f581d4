"""Teacher-forced scores of a model's answers."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, Value
from torch import nn
from tqdm.auto import tqdm

from .._processes import run_on_all
from ..capture import MarginKind, margins
from ..errors import TaskError
from ..models.batches import HalvingOnFullMemory, length_sorted_batches
from ..models.precision import autocast
from ..models.sharding import is_sharded
from ..models.usage import FlopSamples, UsageCounter
from ..models.wrappers import evaluation_mode
from ..tasks import IGNORE_INDEX, TASK, AnswerScores, TaskCollator, pop_meta
from .scores import RowScores, TaskScores

# From a batch's inputs, its labels and the task of each row to the scores of the answers.
Scorer = Callable[[dict[str, Any], torch.Tensor, list[str]], AnswerScores]


class Evaluator:
    """Scores every row of a token table once, in its order.

    The batches are the evaluator's own: options of a training's dataloaders (dropped last batches, persistent workers,
    grouping by length) do not apply. Under a distributed launcher the processes share the rows, and each gets the
    scores of all; a sharded model is run by all of them on all rows. The model's modes and the random state are left as
    they were.

    Args:
        model (`nn.Module`): what is put into evaluation mode and tells the device.
        data_collator (`TaskCollator`): from rows to a batch.
        batch_size (`int`): rows per forward pass; fewer where memory runs out.
        mixed_precision (`str`, *optional*, defaults to `"no"`): `"no"`, `"bf16"` or `"fp16"`, as in training.
        disable_tqdm (`bool`, *optional*, defaults to `False`): no progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        data_collator: TaskCollator,
        batch_size: int,
        mixed_precision: str = "no",
        disable_tqdm: bool = False,
    ):
        self.model = model
        self.data_collator = data_collator
        self.batch_size = batch_size
        self.mixed_precision = mixed_precision
        self.disable_tqdm = disable_tqdm

    def score_tasks(
        self,
        scorer: Scorer,
        tables: Mapping[str, Dataset],
        description: str = "Evaluating",
        samples: FlopSamples | None = None,
    ) -> dict[str, TaskScores]:
        """Score each task's rows.

        Args:
            scorer (`Callable`): see [`Evaluator.score_rows`].
            tables (`dict[str, Dataset]`): token table of each task.
            description (`str`, *optional*, defaults to `"Evaluating"`): label of the progress bar.
            samples (`FlopSamples`, *optional*): what is known of batches that this system scores, whatever their task.

        Raises:
            `TaskError`: for a task without rows.
        """
        total = sum(len(rows) for rows in tables.values())
        hidden = self.disable_tqdm or not PartialState().is_local_main_process
        with tqdm(total=total, desc=description, unit="example", leave=False, disable=hidden) as bar:
            return {
                name: self.score_rows(scorer, rows, name=name, bar=bar, samples=samples).summary()
                for name, rows in tables.items()
            }

    def score_rows(
        self,
        scorer: Scorer,
        rows: Dataset,
        margin: MarginKind = "geometric_mean",
        name: str = "",
        bar: tqdm | None = None,
        samples: FlopSamples | None = None,
    ) -> RowScores:
        """Score each row of a token table; those whose class is hidden are left out.

        Args:
            scorer (`Callable`): from inputs, labels and tasks of a batch to [`AnswerScores`].
            rows (`Dataset`): token columns, and `task`.
            margin (`str`, *optional*, defaults to `"geometric_mean"`): see [`margins`].
            name (`str`, *optional*): the task's name, for errors.
            bar (`tqdm`, *optional*): progress bar to move.
            samples (`FlopSamples`, *optional*): see [`Evaluator.score_tasks`].

        Raises:
            `TaskError`: for an empty table.
            `ScoringError`: for a row without an answer token.
        """
        if not len(rows):
            raise TaskError(
                f"No row of task {name!r} is left to evaluate: every answer was truncated. Raise max_length, or pass "
                "rows with shorter prompts."
            )
        rows = with_answers(rows)
        if not len(rows):
            raise TaskError(
                f"No row of task {name!r} can be scored: expected labels, found hidden ones (-1) only. Use predict for "
                "these rows, or evaluate rows with labels."
            )

        def score() -> tuple[np.ndarray, ...]:
            return self._own_scores(scorer, rows, margin, bar, samples)

        parts = [score()] if is_sharded(self.model) else run_on_all(score)
        order = np.argsort(np.concatenate([part[0] for part in parts]))
        return RowScores(*(np.concatenate([part[column] for part in parts])[order] for column in (1, 2, 3)))

    def _own_scores(
        self, scorer: Scorer, rows: Dataset, margin: MarginKind, bar: tqdm | None, samples: FlopSamples | None
    ) -> tuple[np.ndarray, ...]:
        """Position, loss, correctness and margin of the rows that fall to this process."""
        state = PartialState()
        # How often a model runs depends on the rows: processes that run one together run it on the same ones.
        first, every = (0, 1) if is_sharded(self.model) else (state.process_index, state.num_processes)
        own = list(range(first, len(rows), every))
        device = next(self.model.parameters()).device
        found: list[tuple[np.ndarray, ...]] = []

        def score(examples: list[tuple[int, dict[str, Any]]]) -> None:
            batch = dict(self.data_collator([row for _, row in examples]))
            tasks = pop_meta(batch).get(TASK, [])
            inputs = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
            labels = inputs.pop("labels")
            with usage.batch(inputs, labels), autocast(device, self.mixed_precision):
                answers = scorer(inputs, labels, tasks)
            columns = (answers.loss, answers.exact_match, margins(answers, margin))
            positions = np.array([position for position, _ in examples])
            found.append((positions, *(column.cpu().double().numpy() for column in columns)))

        run = HalvingOnFullMemory(score, self.model)
        usage = UsageCounter(samples)
        with usage, torch.random.fork_rng(), torch.no_grad(), evaluation_mode(self.model):
            lengths = [len(ids) for ids in rows.select(own)["input_ids"]] if own else []
            for batch in length_sorted_batches(lengths, self.batch_size):
                run([(own[index], _without_none(rows[own[index]])) for index in batch])
                if bar is not None:
                    bar.update(len(batch) * every)
        return tuple(np.concatenate(column) for column in zip(*found)) if found else (np.zeros(0),) * 4


def with_answers(rows: Dataset) -> Dataset:
    """The rows but those whose class is hidden."""
    if not isinstance(rows.features.get("labels"), Value):
        return rows
    labels = rows["labels"][:]
    kept = [index for index, label in enumerate(labels) if label != IGNORE_INDEX]
    return rows if len(kept) == len(labels) else rows.select(kept)


def _without_none(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None}
