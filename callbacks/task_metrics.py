"""Scores of every task at each evaluation of a plain trainer."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig

from ..capture import encoded_splits
from ..errors import ConfigurationError, TaskError
from ..evaluate import AnswerEvaluator, AnswerMetrics, Evaluator, TaskScores, mean_scores, metrics_by_task
from ..models.answer_scorer import AnswerScorer
from ..models.kinds import check_kind, check_outputs
from ..models.wrappers import unwrapped
from ..tasks import TASK, TaskSet, data_collator_for
from .host_rows import sft_splits

# What stands in the place of a task's name in the metrics of all tasks.
MEAN = "mean"


class TaskMetricsCallback(TrainerCallback):
    """Adds the loss and accuracy of every task to the metrics of each evaluation.

    A plain trainer evaluates one table; this scores the validation rows of each task beside it: `eval_TASK_loss` (mean
    over the rows of the mean token loss, in nats), `eval_TASK_accuracy` (share of rows whose whole answer is right) and
    their means over the tasks, `eval_mean_loss` and `eval_mean_accuracy`. They are in what `trainer.evaluate()` returns
    and in `state.log_history`; `metric_for_best_model` may name them. The training itself is not changed.

    Args:
        tasks (`TaskSet`): tasks with validation rows. [`TaskSet.from_datasets`] makes one.
        answer_metrics (`AnswerMetric` or `dict[str, AnswerMetric]`, *optional*):
            How generated answers are scored, of all tasks or by task.
        formatting_func (`Callable`, *optional*): that of the `SFTTrainer`, where it has one.

    Attributes:
        scores (`dict[str, TaskScores]`, *optional*): of the latest evaluation, by task.
        trainer (`Trainer`, *optional*): set it to have trackers log the metrics too.

    Raises:
        `ConfigurationError`:
            For anything but a `TaskSet`. In the trainer's constructor, without a tokenizer, for models of another kind
            (token classifiers, masked language models), and for models that have no answers of the rows' kind.
        `TaskError`: for tasks without validation rows, a task named `"mean"`, and for rows that cannot be encoded.

    Example:

    ```python
    >>> tasks = TaskSet.from_datasets(train, validation)
    >>> trainer = SFTTrainer(  # doctest: +SKIP
    ...     model, args, train_dataset=tasks.table("train"), eval_dataset=tasks.table("validation"),
    ...     callbacks=[TaskMetricsCallback(tasks)],
    ... )
    >>> trainer.evaluate()["eval_gsm8k_loss"]  # doctest: +SKIP
    ```
    """

    def __init__(
        self,
        tasks: TaskSet,
        answer_metrics: AnswerMetrics = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
    ):
        if not isinstance(tasks, TaskSet):
            raise ConfigurationError(
                f"Expected tasks to be a TaskSet, found a {type(tasks).__name__}. Make one with TaskSet.from_datasets."
            )
        if MEAN in tasks:
            raise TaskError(f"The task name {MEAN!r} is used for the means over the tasks: rename this task.")
        tasks.split("validation")
        self.tasks = tasks
        self.answer_metrics = metrics_by_task(answer_metrics, tasks)
        self.formatting_func = formatting_func
        self.scores: dict[str, TaskScores] | None = None
        self.trainer: Any = None
        self._tables: Mapping[str, Dataset] | None = None

    def on_init_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        # Whatever is wrong with the rows is said before anything is trained.
        self._tables = self._encoded(args, model, processing_class)

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        self._encode_once(args, model, processing_class)

    def on_evaluate(self, args, state, control, model=None, processing_class=None, metrics=None, **kwargs):
        self._encode_once(args, model, processing_class)
        self.scores = self._scored(args, unwrapped(model), processing_class)
        named = {MEAN: mean_scores(self.scores), **self.scores}
        found = {f"eval_{task}_{name}": value for task, own in named.items() for name, value in own.figures().items()}
        if metrics is not None:
            metrics.update(found)
        if self.trainer is not None:
            self.trainer.log(dict(found))
        else:
            state.log_history.append({**found, "epoch": state.epoch, "step": state.global_step})

    def _encode_once(self, args, model, processing_class) -> None:
        if self._tables is None:
            # Added to the trainer after its constructor.
            self._tables = self._encoded(args, model, processing_class)

    def _encoded(self, args, model, processing_class) -> dict[str, Dataset]:
        if processing_class is None:
            raise ConfigurationError(
                "Expected a trainer with a tokenizer, found none. Pass processing_class to the Trainer."
            )
        check_kind(model)
        if isinstance(args, SFTConfig):
            splits = sft_splits(
                self.tasks, processing_class, args, self.formatting_func, args.max_length, ["validation"]
            )
        else:
            splits = encoded_splits(model, self.tasks, processing_class, None, ["validation"])
        check_outputs(unwrapped(model), self.tasks.label_space)
        rows, names = splits["validation"], splits["validation"][TASK][:]
        return {task: rows.select([index for index, name in enumerate(names) if name == task]) for task in self.tasks}

    def _scored(self, args, model, processing_class) -> dict[str, TaskScores]:
        tasks = self.tasks
        collator = data_collator_for(tasks.row_format, processing_class, not tasks.labels_are_classes)
        precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
        settings = (args.per_device_eval_batch_size, precision, bool(args.disable_tqdm))
        evaluator = Evaluator(model, collator, *settings)
        scores = evaluator.score_tasks(AnswerScorer(model, tasks.label_space), self._tables, "Evaluating tasks")
        if not self.answer_metrics:
            return scores
        answers = AnswerEvaluator(model, processing_class, collator, self.answer_metrics, *settings)

        def generate(input_ids, attention_mask, names, generation_config):
            return model.generate(
                input_ids=input_ids, attention_mask=attention_mask, generation_config=generation_config
            )

        figures = answers.score_tasks(generate, self._tables, "Evaluating tasks, answers")
        return {
            task: replace(own, metrics=figures[task].figures) if task in figures else own
            for task, own in scores.items()
        }
