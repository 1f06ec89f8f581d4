"""What the stages of a run work on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from ..._files import writing
from ...capture import CaptureConfig
from ...capture.training_arguments import GivenOptimizer
from ...evaluate import AnswerEvaluator, Evaluator
from ...models.answer_scorer import AnswerScorer
from ...runs import RunDirectory
from ...tasks import LabelSpace, TaskCollator, TaskSet
from ..configs import RunArguments
from ..model_state import ModelState


class Arguments(RunArguments, TrainingArguments):
    """Type of the arguments of any of the trainers."""


class AdapterTrainerFactory(Protocol):
    """Makes a trainer for the active adapter, see [`MultiTaskMixin.adapter_trainer`]."""

    def __call__(
        self,
        args: TrainingArguments,
        train_dataset: Dataset,
        eval_dataset: Mapping[str, Dataset],
        sampling_weights: Mapping[str, float],
    ) -> Trainer: ...


@dataclass(frozen=True)
class FlowContext:
    """What the stages of a run work on.

    Args:
        run (`RunDirectory`): where everything goes.
        args (`Arguments`): the trainer's arguments.
        model (`PeftModel`): holds the adapter that is trained.
        adapter_name (`str`): the adapter's name on the model.
        model_state (`ModelState`): the model before any trainer has prepared it.
        tasks (`TaskSet`): the tasks.
        train_rows (`Dataset`): token table of all tasks' training rows, as trainers take it.
        eval_rows (`dict[str, Dataset]`): token table of each task's validation rows, as trainers take it.
        model_columns (`Callable`): drops the columns that neither the model nor the rows' identity needs.
        data_collator (`TaskCollator`): from rows to a padded batch, one row each.
        num_drawn_rows (`Callable`): number of rows of each task that a training draws from; packed rows count once.
        processing_class (`PreTrainedTokenizerBase`, *optional*): the tokenizer, where rows are not given as tokens.
        label_space (`LabelSpace`, *optional*): label sets of classification tasks.
        mixed_precision (`str`): precision of the training: `"no"`, `"bf16"` or `"fp16"`.
        evaluator (`Evaluator`): scores rows.
        answers (`AnswerEvaluator`): generates answers, of the tasks that have a metric for them.
        make_trainer (`AdapterTrainerFactory`): makes a trainer for the adapter.
        make_predictor (`Callable`): makes a trainer for the adapter whose evaluation sets are given token tables.
        computes_metrics (`Callable`): whether trainers have `compute_metrics`.
        optimizer (`tuple`, *optional*): `optimizer_cls_and_kwargs` of the trainer.
    """

    run: RunDirectory
    args: Arguments
    model: PeftModel
    adapter_name: str
    model_state: ModelState
    tasks: TaskSet
    train_rows: Dataset
    eval_rows: Mapping[str, Dataset]
    model_columns: Callable[[Dataset], Dataset]
    data_collator: TaskCollator
    num_drawn_rows: Callable[[], Mapping[str, int]]
    processing_class: PreTrainedTokenizerBase | None
    label_space: LabelSpace | None
    mixed_precision: str
    evaluator: Evaluator
    answers: AnswerEvaluator
    make_trainer: AdapterTrainerFactory
    make_predictor: Callable[[Mapping[str, Dataset]], Trainer]
    computes_metrics: Callable[[], bool]
    optimizer: GivenOptimizer | None = None

    @cached_property
    def train_table(self) -> Dataset:
        """The training rows as the model takes them."""
        return self.model_columns(self.train_rows)

    @cached_property
    def eval_tables(self) -> dict[str, Dataset]:
        """Each task's validation rows as the model takes them."""
        return {name: self.model_columns(rows) for name, rows in self.eval_rows.items()}

    def capture_config(self) -> CaptureConfig:
        """Settings of the capture pass."""
        return self.args.capture_config(self.optimizer)

    def num_captured_rows(self) -> int:
        """How many rows the capture takes gradients of."""
        train = {name: len(task.splits["train"]) for name, task in self.tasks.items()}
        held_out = {name: len(rows) for name, rows in self.eval_rows.items()}
        args = self.args
        return args.num_captured_rows("train", train) + args.num_captured_rows("validation", held_out)

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer, where there is one, into a folder that holds what was trained with it."""
        if self.processing_class is not None:
            with writing(folder):
                self.processing_class.save_pretrained(folder)

    def answer_scorer(self) -> AnswerScorer:
        """Scores answers with whichever adapter of the model is active."""
        return AnswerScorer(self.model, self.label_space)
