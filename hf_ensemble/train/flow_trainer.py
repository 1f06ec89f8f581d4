"""What the public trainers share: a flow over the user's arguments, and the parent trainer where there is none yet."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from datasets import Dataset
from transformers.trainer_utils import TrainOutput

from .._processes import is_main_process
from ..errors import ConfigurationError
from ..evaluate import AnswerEvaluator, AnswerMetric, AnswerMetrics, Evaluator, TaskScores, metrics_by_task
from ..logging import get_logger
from ..runs import RunDirectory, TasksRecord
from ..select import DataSelector
from ..store import GradientStore
from ..tasks import RowFormat
from .configuration import choices_of, configuration_of
from .flows.capturing import captured_gradients
from .flows.context import FlowContext
from .flows.ensemble_flow import EnsembleFlow
from .flows.selection_flow import SelectionFlow
from .tracking import tracked_run

logger = get_logger(__name__)

Flow = TypeVar("Flow", EnsembleFlow, SelectionFlow)


class FlowTrainerMixin(Generic[Flow]):
    """A trainer over several tasks whose [`train`] runs the stages of a flow.

    Args:
        answer_metrics (`AnswerMetric` or `dict[str, AnswerMetric]`, *optional*):
            How generated answers are scored, of all tasks or by task; evaluations report it beside loss and accuracy.

    Attributes:
        flow (`EnsembleFlow` or `SelectionFlow`, *optional*): the stages; there from [`open_run`] on.
        answer_metrics (`dict[str, AnswerMetric]`): by task.
    """

    flow: Flow | None = None
    _is_working: bool = False

    def __init__(self, *args: Any, answer_metrics: AnswerMetrics = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.trains_directly:
            if answer_metrics is not None:
                raise ConfigurationError(
                    "answer_metrics is for runs over several datasets with an adapter, and this trainer trains one "
                    "model as its parent does. Leave it out, and pass compute_metrics."
                )
            return
        self.answer_metrics: dict[str, AnswerMetric] = metrics_by_task(answer_metrics, self.tasks)
        if self.answer_metrics:
            if self.tasks.row_format is RowFormat.CLASSIFICATION:
                raise ConfigurationError(
                    f"answer_metrics is about generated answers, and {type(self).__name__} was given text with labels: "
                    "a classifier's answers are its labels, which accuracy scores. Leave it out."
                )
            self._answer_evaluator().check(self.eval_dataset)

    def _make_flow(self, context: FlowContext) -> Flow:
        raise NotImplementedError

    def _run_configuration(self) -> dict[str, Any]:
        rows = {
            "train": self.train_dataset,
            **{f"validation of {name}": own for name, own in self.eval_dataset.items()},
        }
        return configuration_of(self.model, self.tasks, rows, self.args, type(self), self._adapter_trainer_kwargs)

    def _run_choices(self) -> dict[str, Any]:
        return choices_of(self.args)

    @property
    def run_directory(self) -> RunDirectory | None:
        """The run in `output_dir`; `None` before [`open_run`]."""
        return None if self.flow is None else self.flow.context.run

    def open_run(self) -> RunDirectory:
        """Open the run in `output_dir`, or begin one.

        Raises:
            `RunMismatchError`: when it holds a run of another configuration.
        """
        if self.trains_directly:
            raise ConfigurationError(
                "This trainer trains one model as its parent class does, so there is no run over several datasets. "
                "Pass a dict of at least two datasets, and peft_config=LoraConfig(...)."
            )
        # Between trainings the model is as no trainer has touched it, but for what the user has changed.
        self._model_state.record()
        if self.flow is None:
            run = RunDirectory.open(
                self.args.output_dir,
                self._run_configuration(),
                self._run_choices(),
                self.args.overwrite_run,
            )
            run.write(TasksRecord.of(self.tasks))
            self.flow = self._make_flow(self._context(run))
        return self.flow.context.run

    @contextmanager
    def working(self) -> Iterator[None]:
        """While open, the run is open, trainings begin where gradients are captured, and no other process works in it.

        Raises:
            `RunMismatchError`: when `output_dir` holds a run of another configuration.
            `RunLockedError`: when another process works in it.
        """
        with RunDirectory(self.args.output_dir).locked():
            self.open_run()
            if self._is_working:
                yield
                return
            self._is_working = True
            try:
                self.flow.start()
                yield
            finally:
                self._is_working = False
                self.flow.finish()

    def _answer_evaluator(self) -> AnswerEvaluator:
        return AnswerEvaluator(
            self.model,
            self.processing_class,
            self.row_collator,
            self.answer_metrics,
            self.args.per_device_eval_batch_size,
            self.accelerator.mixed_precision,
            bool(self.args.disable_tqdm),
        )

    def _context(self, run: RunDirectory) -> FlowContext:
        precision = self.accelerator.mixed_precision
        return FlowContext(
            run=run,
            args=self.args,
            model=self.model,
            adapter_name=self.model.active_adapters[0],
            model_state=self._model_state,
            tasks=self.tasks,
            train_rows=self.train_dataset,
            eval_rows=self.eval_dataset,
            model_columns=self._remove_unused_columns,
            data_collator=self.row_collator,
            num_drawn_rows=self.num_drawn_rows,
            processing_class=self.processing_class,
            label_space=self.label_space,
            mixed_precision=precision,
            evaluator=Evaluator(
                self.model,
                self.row_collator,
                self.args.per_device_eval_batch_size,
                precision,
                bool(self.args.disable_tqdm),
            ),
            answers=self._answer_evaluator(),
            make_trainer=self.adapter_trainer,
            log_history=self.state.log_history,
        )

    def train(
        self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: list[str] | None = None
    ) -> TrainOutput:
        """Run every stage that `output_dir` does not hold yet.

        A run that was killed and is started again with the same configuration goes on where it stopped.

        Args:
            resume_from_checkpoint (`bool`, *optional*): has no effect, since runs resume by themselves.
            trial (*optional*): of a hyperparameter search, which only a single training takes.
            ignore_keys_for_eval (`list[str]`, *optional*): outputs that evaluations during each training leave out.

        Returns:
            `TrainOutput`: steps and mean training loss, and the metrics of [`evaluate`].

        Raises:
            `RunMismatchError`: when `output_dir` holds a run of another configuration.
            `RunLockedError`: when another process works in it.
            `ConfigurationError`: for arguments that only a single training takes.
        """
        if self.trains_directly:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if trial is not None:
            raise ConfigurationError(
                f"Expected no trial, since {type(self).__name__}.train() runs several trainings, none of which is the "
                "trial of a hyperparameter search. Leave it out, and compare runs in different output_dirs."
            )
        if resume_from_checkpoint not in (None, True, False):
            raise ConfigurationError(
                f"Expected no checkpoint in resume_from_checkpoint, since a run consists of several trainings; found "
                f"{resume_from_checkpoint!r}. Leave it out: a run that is started again resumes by itself."
            )
        with self.working(), tracked_run(self):
            self.flow.training.ignore_keys_for_eval = ignore_keys_for_eval
            output = self.flow.train()
            # Of the whole run, so that trackers see its metrics after those of its trainings.
            self.state.global_step = self.run_directory.num_steps()
            self.log(dict(output.metrics))
        if self.args.push_to_hub:
            self._push_finished()
        return output

    def _push_finished(self) -> None:
        """Upload what `train` has made. A failure is reported: the run is complete without it."""
        try:
            self.push_to_hub()
        except Exception as error:  # whatever the connection, the Hub or a file raises
            logger.error(
                "The run in %r is complete, but was not uploaded: %s: %s. Call trainer.push_to_hub(), or start the "
                "same script again.",
                self.args.output_dir,
                type(error).__name__,
                error,
            )

    def capture(self) -> GradientStore:
        """The run's gradient store; the gradients are captured where the run does not hold them yet."""
        with self.working():
            return captured_gradients(self.flow.context, self.flow.training)

    def selector(self) -> DataSelector:
        """Predictions from the run's gradients, calibrated as the run's choices are.

        Gradients are captured and calibrating fine-tunings made where the run does not hold them yet.
        """
        self.capture()
        with self.working():
            return self.flow.calibration.selector(self.flow.num_calibration_runs())

    def _is_trained(self) -> bool:
        raise NotImplementedError

    def evaluate(
        self,
        eval_dataset: Mapping[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss and accuracy of every task; before [`train`], the parent trainer's evaluation of the untrained adapter.

        Args:
            eval_dataset (`dict[str, Dataset]`, *optional*): rows of each task, for example test rows.
            ignore_keys (`list[str]`, *optional*): used before training only.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): first word of the metrics' names.

        Returns:
            `dict[str, float]`: `PREFIX_TASK_loss` and `PREFIX_TASK_accuracy` (share of rows whose whole answer is
            right), the metrics of generated answers where there are `answer_metrics` (`PREFIX_TASK_exact_match`), and
            `PREFIX_mean_...` over the tasks.

        Raises:
            `TaskError`: for unknown tasks, and for a task whose every answer is cut off.
        """
        if self.trains_directly:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._model_state.record()
        if not self._is_trained():
            eval_dataset = None if eval_dataset is None else self.prepare_rows(eval_dataset)
            with self._model_state.restored():
                return self._single_trainer().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        with self.working():
            metrics = self.flow.evaluate(self._tables(eval_dataset), metric_key_prefix)
        self.log(dict(metrics))
        return metrics

    def scores(self, eval_dataset: Mapping[str, Dataset] | None = None) -> dict[str, dict[str, TaskScores]]:
        """Scores of the base model and of every system of the run, by system and task.

        Args:
            eval_dataset (`dict[str, Dataset]`, *optional*): rows of each task; the evaluation rows by default.

        Raises:
            `ConfigurationError`: before training.
        """
        if not self._is_trained():
            raise ConfigurationError("There is nothing to score yet: call train() first.")
        tables = self._tables(eval_dataset)
        self._model_state.record()
        with self.flow.context.model_state.restored():
            base = self.flow.evaluation.score_base(tables)
        return {"base": base, **self.flow.scores(tables)}

    def _tables(self, eval_dataset: Mapping[str, Dataset] | None) -> Mapping[str, Dataset]:
        if eval_dataset is None:
            return self.flow.context.eval_tables
        tables = self.prepare_rows(eval_dataset)
        return {name: self._remove_unused_columns(rows) for name, rows in tables.items()}

    def _single_trainer(self):
        """The parent trainer over all tasks, for what it can do before a run has made anything."""
        args = copy.copy(self.args)
        args.push_to_hub = False
        return self.adapter_trainer(args, self.train_dataset, self.eval_dataset, self.tasks.sampling_weights)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ):
        """Upload what the run has made: the ensemble with its model card, or the final adapter.

        Takes the arguments of `Trainer.push_to_hub`; `hub_model_id`, `hub_token`, `hub_private_repo` and
        `hub_revision` are read from `args`. It always waits for the upload, and makes the card from the run, not from
        `kwargs`.

        Raises:
            `ConfigurationError`: before training.
        """
        if self.trains_directly:
            return super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
        if kwargs:
            logger.info("The card is made from the run; %s are not used.", sorted(kwargs))
        if not is_main_process():
            return None
        return self._upload(
            self.args.hub_model_id or Path(self.args.output_dir).resolve().name,
            commit_message=commit_message,
            token=token or self.args.hub_token,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
        )

    def _upload(self, repo_id: str, **kwargs: Any):
        raise NotImplementedError
