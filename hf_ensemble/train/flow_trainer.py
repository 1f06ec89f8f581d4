"""What the public trainers share: a flow over the user's arguments."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from transformers.trainer_utils import TrainOutput

from .._processes import is_main_process, run_on_main
from .._settings import check_number, checked_shard
from ..errors import ConfigurationError
from ..evaluate import AnswerEvaluator, AnswerMetric, AnswerMetrics, Evaluator, metrics_by_task
from ..logging import get_logger
from ..publish import write_report
from ..runs import RunDirectory, TasksRecord
from ..runs.progress import EVALUATION, check_stage, stages_named, wait_for_stage
from ..select import DataSelector
from ..store import GradientStore
from ..tasks import RowFormat
from .configuration import choices_of, configuration_of
from .flows.capturing import captured_gradients
from .flows.context import FlowContext
from .flows.ensemble_flow import EnsembleFlow
from .flows.run_log import follow, training_metrics
from .flows.selection_flow import SelectionFlow
from .flows.stages import announce, announced
from .flows.starting_values import keep_start, take_up_start
from .outcome import OutcomeMixin
from .tracking import tracked_run

logger = get_logger(__name__)

Flow = TypeVar("Flow", EnsembleFlow, SelectionFlow)


class FlowTrainerMixin(OutcomeMixin, Generic[Flow]):
    """A trainer over several tasks whose [`train`] runs the stages of a flow.

    Args:
        answer_metrics (`AnswerMetric` or `dict[str, AnswerMetric]`, *optional*):
            How generated answers are scored, of all tasks or by task; evaluations report it beside loss and accuracy.

    Attributes:
        flow (`EnsembleFlow` or `SelectionFlow`, *optional*): the stages; there from [`open_run`] on.
        answer_metrics (`dict[str, AnswerMetric]`): by task.
    """

    flow: Flow | None = None

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
            if self.processing_class is None:
                raise ConfigurationError(
                    "answer_metrics reads generated answers as text, and there is no tokenizer. Pass processing_class."
                )
            self._answer_evaluator().check(self.eval_dataset)

    def _make_flow(self, context: FlowContext) -> Flow:
        raise NotImplementedError

    def _run_configuration(self) -> dict[str, Any]:
        rows = {
            "train": self.train_dataset,
            **{f"validation of {name}": own for name, own in self.eval_dataset.items()},
        }
        given = self._given_to_trainings()
        return configuration_of(self.adapter_model, self.tasks, rows, self.args, type(self), given)

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
        self._record_model()
        if self.flow is None:
            configuration = self._run_configuration()
            if take_up_start(self.adapter_model, RunDirectory(self.args.output_dir), configuration):
                configuration = self._run_configuration()
            run = RunDirectory.open(
                self.args.output_dir,
                configuration,
                self._run_choices(),
                self.args.overwrite_run,
            )
            tasks = TasksRecord.of(self.tasks, self.args.task_loss_weighting, self.args.card_examples)
            run_on_main(lambda: run.write_shared(tasks))
            keep_start(self.adapter_model, run)
            self.flow = self._make_flow(self._context(run))
        return self.flow.context.run

    @contextmanager
    def working(self, is_announced: bool = False) -> Iterator[None]:
        """While open, the run is open, trainings begin where gradients are captured, and no other process works in it.

        Args:
            is_announced (`bool`, *optional*, defaults to `False`): tell of each stage as it begins.

        Raises:
            `RunMismatchError`: when `output_dir` holds a run of another configuration.
            `RunLockedError`: when another process works in it.
            `ConfigurationError`: when it is opened from within a training.
        """
        self._check_between_trainings()
        with RunDirectory(self.args.output_dir).locked():
            self.open_run()
            if self._is_working:
                yield
                return
            self._is_working = True
            stages = self.flow.stages() if is_announced else None
            try:
                with announced(self.run_directory, stages, with_bars=not self.args.disable_tqdm):
                    self.flow.start()
                    yield
                follow(self.state, self.flow.trainings())
            finally:
                self._is_working = False
                self.flow.finish()

    def _answer_evaluator(self) -> AnswerEvaluator:
        return AnswerEvaluator(
            self.adapter_model,
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
            model=self.adapter_model,
            adapter_name=self.adapter_model.active_adapters[0],
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
                self.adapter_model,
                self.row_collator,
                self.args.per_device_eval_batch_size,
                precision,
                bool(self.args.disable_tqdm),
            ),
            answers=self._answer_evaluator(),
            make_trainer=self.adapter_trainer,
            make_predictor=self._prediction_trainer,
            computes_metrics=lambda: self.compute_metrics is not None,
            optimizer=self._adapter_trainer_kwargs.get("optimizer_cls_and_kwargs"),
        )

    def train(
        self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: list[str] | None = None
    ) -> TrainOutput:
        """Run every stage that `output_dir` does not hold yet.

        A run that was killed and is started again with the same configuration goes on where it stopped.

        Args:
            resume_from_checkpoint (`bool`, *optional*): has no effect, since runs resume by themselves.
            trial (*optional*): of a hyperparameter search, which only a single training takes.
            ignore_keys_for_eval (`list[str]`, *optional*):
                Outputs that evaluations during each training, and `compute_metrics` after them, leave out.

        Returns:
            `TrainOutput`: steps and mean loss of all trainings, and the metrics of a training (`train_runtime`,
            `train_loss`, `total_flos`, ...) and of [`evaluate`].

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
        self._memory_tracker.start()
        with self.working(is_announced=True), tracked_run(self):
            self.flow.training.ignore_keys_for_eval = ignore_keys_for_eval
            self.flow.evaluation.ignore_keys = ignore_keys_for_eval
            evaluated = self.flow.train()
            trainings = self.flow.trainings()
            # Of the whole run, so that trackers see its metrics after those of its trainings.
            self.state.log_history = []
            follow(self.state, trainings)
            self._report(evaluated)
            metrics = training_metrics(trainings)
            self._memory_tracker.stop_and_update_metrics(metrics)
            # Callbacks may take out what they do not print.
            logged = dict(metrics)
            self.log(logged)
        self._serve()
        page = self.write_page()
        if page is not None:
            announce(f"Report: {page}", with_bars=not self.args.disable_tqdm)
        announce(self.report().verdict, with_bars=not self.args.disable_tqdm)
        if self.args.push_to_hub:
            self._push_finished()
        return TrainOutput(self.state.global_step, metrics["train_loss"], {**evaluated, **logged, **metrics})

    def write_page(self) -> Path | None:
        """Write the page of the run, unless `save_report` is off. A page that fails is reported, and stops nothing."""
        if not self.args.save_report or not is_main_process():
            return None
        try:
            return write_report(self.run_directory.path)
        except Exception as error:  # whatever fonts, backends or records raise
            logger.warning(
                "The page of the run in %r could not be written: %s: %s. The run is complete without it; "
                "hf-ensemble report %s writes it again.",
                self.args.output_dir,
                type(error).__name__,
                error,
                self.args.output_dir,
            )
            return None

    def capture(self) -> GradientStore:
        """The run's gradient store; the gradients are captured where the run does not hold them yet."""
        with self.working():
            return captured_gradients(self.flow.context, self.flow.training)

    def run_stage(self, name: str, shard: tuple[int, int] | str | None = None, wait: float = 0.0) -> None:
        """Run one stage of the run, while other processes may run others, on machines that share `output_dir`.

        A process that was killed goes on where it stopped when it is started again. `hf-ensemble status` and
        [`run_progress`] list the stages. The artefacts are those of [`train`] in a single process.

        Args:
            name (`str`):
                The stage, such as `"baseline"` or `"adapter:group_0"`; `"adapter"` and `"calibration"` are all stages
                of this kind, `"evaluation"` is what is left: weights, boosting steps and scores.
            shard (`tuple[int, int]`, *optional*):
                Index and number of parts, of which this process runs one: of the rows of gradients, or of the adapters
                or calibrating fine-tunings.
            wait (`float`, *optional*, defaults to 0.0): seconds to wait for what the stage needs.

        Raises:
            `StageNotReadyError`: when what the stage needs is not there after that time; it is named.
            `RunLockedError` or `StoreLockedError`: when another process works on the stage.
            `ConfigurationError`:
                For an unknown stage, a shard of a stage without parts, one of the groups of a run with
                `sequential_groups`, and `overwrite_run` in a process that has not begun the run.
        """
        shard = checked_shard("shard", shard)
        check_stage(name, shard)
        check_number("wait", wait, 0)
        if self.flow is None and self.args.overwrite_run:
            raise ConfigurationError(
                "Expected a run that is there, one stage of which is run beside the others; found overwrite_run=True, "
                "which may start it over while other processes work in it. Leave it out.",
                python="To start over, call train() with it first.",
                terminal="To start over, delete output_dir first.",
            )
        self._check_between_trainings()
        run = self.open_run()

        def tell(text: str) -> None:
            announce(text, with_bars=not self.args.disable_tqdm)

        wait_for_stage(run, name, shard, wait, tell)
        # Adapters are known once groups are chosen.
        stages = run_on_main(lambda: stages_named(run, name, shard))
        if name == EVALUATION:
            self.train()
            return
        run.refresh()
        self.flow.start()
        try:
            for stage in stages:
                self.flow.run_stage(stage, shard)
        finally:
            self.flow.finish()

    def selector(self) -> DataSelector:
        """Predictions of trainings from the start, or from the meta-initialization of a selection.

        Gradients are captured and the fine-tunings that they need made where the run does not hold them yet.
        """
        with self.working():
            return self.flow.selector()
