"""The stages of a selection run: optional meta-initialization, gradients, selection, one final fine-tuning."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
from datasets import Dataset

from ..._processes import is_main_process, run_on_main, wait_for_everyone
from ...capture import applied_update
from ...estimate import ObservedRun, SubsetEstimator
from ...evaluate import TaskScores
from ...publish import renew_model_card
from ...runs import Costs, SystemCost, TrainedAdapter, run_selector
from ...runs.progress import ADAPTER, GRADIENTS, META, SELECT
from ...select import DataSelector, Selection
from ...store import GradientStore
from ..task_trainer import TaskSFTTrainer, TaskTrainer
from .adapter_training import AdapterTraining
from .calibration import Calibration
from .capturing import captured_gradients
from .context import FlowContext
from .evaluation import SystemEvaluation, flat_metrics
from .example_rows import keep_example_rows
from .predictions import prediction_trainer
from .stages import EVALUATION, FORWARD, TRAINING, Stage, begin_evaluation
from .system_costs import system_cost

MAIN_SYSTEM = "selection"


class SelectionFlow:
    """Runs the stages that the run does not hold yet.

    Args:
        context (`FlowContext`): what the run works on.
        target (`str`): the task to do well on.

    Attributes:
        selection (`Selection`): the tasks that the final adapter was trained on.
    """

    def __init__(self, context: FlowContext, target: str):
        self.context = context
        self.target = target
        self.training = AdapterTraining(context)
        self.evaluation = SystemEvaluation(context)
        self.calibration = Calibration(context, self.training, self.evaluation)
        self.selection: Selection | None = None
        self._costs: dict[str, SystemCost] = {}
        self._is_started = False

    def stages(self) -> list[Stage]:
        """What [`train`] runs, to be announced."""
        rows = sum(map(len, self.context.eval_tables.values()))
        one = self.training.num_rows(self.context.tasks.names) * TRAINING
        found = [
            Stage(META, "initialization", one),
            Stage(GRADIENTS, "gradients", self.context.num_captured_rows() * TRAINING),
            *self.calibration.announced(self.num_calibration_runs(), rows),
            Stage(SELECT, "selection"),
            # About half of the rows are kept.
            Stage(ADAPTER, "the final adapter", one / 2),
            Stage(EVALUATION, "evaluation", 2 * rows * FORWARD),
        ]
        return [own for own in found if own.name != META or self.context.args.meta_initialization]

    def start(self) -> None:
        """Settle theta0 before anything is captured or trained, by `meta_initialization` where it is asked for."""
        if self._is_started or not self.context.args.meta_initialization:
            return
        run = self.context.run
        run.refresh()
        # One that is done is only read: jobs that begin at it do not keep each other out.
        is_there = run.is_done(META) and run_on_main(run.meta_initialization.is_dir)
        with nullcontext() if is_there else run.stage(META):
            self.training.run(META, self.context.tasks.names, run.meta_initialization)
        self.training.start_from(run.meta_initialization)
        self._is_started = True

    def finish(self) -> None:
        """Leave the final adapter in the model, where there is one."""
        if self.selection is not None:
            self.training.load(self.context.run.adapter)

    def train(self) -> dict[str, float]:
        """Run every stage, and return the metrics of the evaluation; the final adapter is left in the model."""
        run = self.context.run
        captured_gradients(self.context, self.training)
        self._train_adapter()
        self.calibration.discard(self.num_calibration_runs())
        names = [META, *self.calibration.training_names(self.num_calibration_runs()), ADAPTER]
        run_on_main(lambda: run.order_trainings(names))
        self.training.load(run.adapter)
        begin_evaluation(run)
        return self.evaluate(self.context.eval_tables, "eval")

    def _train_adapter(self) -> None:
        run = self.context.run
        self.selection = self._select()
        with run.stage(ADAPTER):
            if self.calibration.reuse(self.selection.weights, ADAPTER, run.adapter) is None:
                self.training.run(ADAPTER, self.selection.weights, run.adapter)
            if is_main_process():
                # The card's code, and whoever loads the adapter elsewhere, takes it from there.
                self.context.save_tokenizer(run.adapter)
            wait_for_everyone()

    def run_stage(self, name: str, shard: tuple[int, int] | None = None) -> None:
        """Run one stage, whose needs are there, beside other processes with other stages.

        Args:
            name (`str`): the stage; `"evaluation"` is [`train`].
            shard (`tuple[int, int]`, *optional*): which part of the gradients.
        """
        if name == GRADIENTS:
            captured_gradients(self.context, self.training, shard)
        elif name == SELECT:
            self._select()
        elif name == ADAPTER:
            self._train_adapter()
        elif name != META:
            self.calibration.run_stage(name, self.num_calibration_runs())

    def trainings(self) -> list[TrainedAdapter]:
        """The finished trainings that the final adapter rests on, in the order of their steps."""
        names = {META, ADAPTER, *self.calibration.training_names(self.num_calibration_runs())}
        return [own for own in run_on_main(self.context.run.trainings) if own.name in names]

    def selector(self) -> DataSelector:
        """The predictions that the selection is made by."""
        captured_gradients(self.context, self.training)
        return self.calibration.selector(self.num_calibration_runs())

    def num_calibration_runs(self) -> int:
        return self.context.args.calibration_runs

    def _select(self) -> Selection:
        run, observed = self.context.run, self.calibration.observed_runs(self.num_calibration_runs())
        with run.stage(SELECT, Selection) as todo:
            if not todo:
                return run_on_main(lambda: run.read(Selection))
            if self.context.args.selection_metric == "answers":
                # Every process makes the same search: they share the rows that are answered.
                selection = self._chosen(observed, self.answered)
                selection = run_on_main(lambda: selection)
            else:
                # One process predicts and chooses, the others take its choice.
                selection = run_on_main(lambda: self._chosen(observed))
            run.write(selection)
            wait_for_everyone()
        return selection

    def _chosen(
        self, observed: list[ObservedRun], answered: Callable[[SubsetEstimator, np.ndarray], float] | None = None
    ) -> Selection:
        args, run = self.context.args, self.context.run
        tasks = self.context.tasks.names
        selector = run_selector(run, tasks, args.num_components, observed, device=args.estimate_device)
        verify = None if answered is None else partial(answered, selector.estimator)
        selection = selector.select(self.target, verify=verify, **args.select_arguments())
        keep_example_rows(self.context, selector, self.target, selection.weights)
        return selection

    def answered(self, estimator: SubsetEstimator, coefficients: np.ndarray) -> float:
        """The first metric of the target's generated answers with predicted parameters in the model."""
        context = self.context
        store = GradientStore(context.run.gradients)
        table = {self.target: context.eval_tables[self.target]}
        update = run_on_main(lambda: estimator.parameters_at(coefficients))
        self.training.reset()
        with context.model_state.restored(), applied_update(context.model, store, update):
            figures = context.answers.score_tasks(self.evaluation.generate, table, "Verifying a candidate")
        return next(iter(figures[self.target].figures.values()))

    def scores(self, tables: Mapping[str, Dataset]) -> dict[str, dict[str, TaskScores]]:
        """Scores of the base model and of the final adapter, by task."""
        with self.context.model_state.restored():
            scores = {"base": self.evaluation.score_base(tables)}
            self._costs["base"] = system_cost([], [], self.evaluation.forward)
            scores[MAIN_SYSTEM] = self.evaluation.score_current(tables, "Evaluating the final adapter")
        own = run_on_main(lambda: self.calibration.origin(ADAPTER, self.selection.weights))
        names = (META, own)
        trainings = [own for own in run_on_main(self.context.run.trainings) if own.name in names]
        self._costs[MAIN_SYSTEM] = system_cost(trainings, [self.context.run.adapter], self.evaluation.forward)
        return scores

    def evaluate(self, tables: Mapping[str, Dataset], prefix: str, is_of_own_rows: bool = True) -> dict[str, float]:
        """Score and report the scores; the target's are also the metrics `PREFIX_loss` and `PREFIX_accuracy`.

        What is not the run's own (`is_of_own_rows`) may not be reported, see [`SystemEvaluation.is_kept`].
        """
        start = time.time()
        if not run_on_main(lambda: self.evaluation.is_kept(prefix, tables, is_of_own_rows)):
            scores = self.scores(tables)
        else:
            with self.context.run.repeated(f"evaluation:{prefix}"):
                scores = self.scores(tables)
            self.report(prefix, scores)
        metrics = flat_metrics(scores, prefix, MAIN_SYSTEM, self.target)
        return metrics | self.evaluation.speed(prefix, start, scores)

    @contextmanager
    def predictor(self, tables: Mapping[str, Dataset]) -> Iterator[TaskTrainer | TaskSFTTrainer]:
        """While open, a trainer that predicts with the final adapter."""
        with self.context.model_state.restored(), prediction_trainer(self.context, tables) as trainer:
            yield trainer

    def report(self, prefix: str, scores: Mapping[str, Mapping[str, TaskScores]]) -> None:
        """Keep the scores in the run and renew the model card."""
        if is_main_process():
            self.context.run.write(Costs(dict(self._costs)))
            self.evaluation.keep(prefix, scores)
            renew_model_card(self.context.run, self.context.run.adapter)
        wait_for_everyone()
