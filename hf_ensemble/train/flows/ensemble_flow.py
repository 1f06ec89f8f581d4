"""The stages of an ensemble run: gradients, baseline, groups, an adapter per group, weights, boosting, evaluation."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from datasets import Dataset

from ..._processes import is_main_process, run_on_main, wait_for_everyone
from ...ensemble import PeftEnsembleModel
from ...estimate import SubsetEstimator
from ...evaluate import TaskScores
from ...publish import renew_model_card
from ...runs import Boosting, Costs, SystemCost, TrainedAdapter
from ...runs.progress import ADAPTER, AT_BASELINE, BOOSTING, CALIBRATION, GRADIENTS, GROUP, WEIGHTS
from ...runs.systems import BASELINE
from ...select import DataSelector, Grouping
from ..inputs.boosting import TRAINED_METHODS
from ..task_trainer import TaskSFTTrainer, TaskTrainer
from .adapter_training import AdapterTraining
from .assembly import EnsembleAssembly
from .boosting.stage import EnsembleBoosting, step_name
from .calibration import Calibration
from .capturing import captured_gradients, gradients_at_baseline
from .context import FlowContext
from .evaluation import SystemEvaluation, flat_metrics
from .groups.trainings import GroupTrainings
from .predictions import prediction_trainer
from .stages import EVALUATION, FORWARD, TRAINING, Stage, begin_evaluation
from .system_costs import system_cost

MAIN_SYSTEM = "ensemble"


class EnsembleFlow:
    """Runs the stages that the run does not hold yet.

    Args:
        context (`FlowContext`): what the run works on.

    Attributes:
        ensemble (`PeftEnsembleModel`): what [`EnsembleFlow.train`] ends with.
        grouping (`Grouping`): which tasks each adapter was trained on.
        costs (`dict[str, SystemCost]`): of the systems that were scored.
    """

    def __init__(self, context: FlowContext):
        self.context = context
        self.training = AdapterTraining(context)
        self.evaluation = SystemEvaluation(context)
        self.calibration = Calibration(context, self.training, self.evaluation)
        self.groups = GroupTrainings(context, self.training, self.calibration, self.num_calibration_runs())
        self.ensemble: PeftEnsembleModel | None = None
        self.grouping: Grouping | None = None
        self._adapters = Stage(ADAPTER, "adapter")
        self.costs: dict[str, SystemCost] = {}

    def stages(self) -> list[Stage]:
        """What [`train`] runs, to be announced."""
        args, training = self.context.args, self.training
        rows = sum(map(len, self.context.eval_tables.values()))
        one = training.num_rows(self.context.tasks.names) * TRAINING
        # What groups cost is known once they are chosen: a partition trains on every row once, for a group's length.
        groups = self._group_length if args.compute_budget is None else args.compute_budget - float(args.train_baseline)
        self._adapters = Stage(ADAPTER, "adapter", one * max(groups, 0.0))
        # A step is for the rows of one group, which are trained on, or scored by three adapters.
        step = one / 3 if args.boosting_method in TRAINED_METHODS else len(self.context.train_rows) / 3 * FORWARD
        boosting = args.boosting_steps * (step + 2 * rows * FORWARD)
        captured = self.context.num_captured_rows() * TRAINING
        goes_on = args.group_initialization == "baseline"
        found = [
            Stage(GRADIENTS, "gradients", captured),
            Stage(BASELINE, "one adapter for all", one + rows * FORWARD),
            *([Stage(AT_BASELINE, "gradients at the adapter for all", captured)] if goes_on else []),
            *self.calibration.announced(self.num_calibration_runs(), rows),
            Stage(GROUP, "groups"),
            self._adapters,
            Stage(WEIGHTS, "weights", 3 * rows * FORWARD),
            Stage(BOOSTING, "boosting", boosting),
            Stage(EVALUATION, "evaluation", 4 * rows * FORWARD),
        ]
        runs_too = {BASELINE: args.train_baseline, BOOSTING: args.boosting_steps > 0}
        return [own for own in found if runs_too.get(own.name, True)]

    def start(self) -> None:
        """Trainings begin at the model's own adapter, as it was at first."""
        self.training.reset()

    def finish(self) -> None:
        """Leave the one adapter for all tasks in the model's own, beside those of the ensemble.

        Without a baseline it stays at its start.
        """
        if self.ensemble is not None and self.context.args.train_baseline:
            self.training.load(self.context.run.baseline)

    def train(self) -> dict[str, float]:
        """Run every stage, and return the metrics of the evaluation."""
        self.group()
        self.train_groups()
        self._assemble(with_boosting=self.context.args.boosting_steps > 0)
        begin_evaluation(self.context.run)
        return self.evaluate(self.context.eval_tables, "eval")

    def group(self) -> None:
        """Run the stages up to the groups: gradients, the one adapter for all, groups."""
        self._prepare()
        self.grouping = self.groups.chosen()
        self._know_groups(self.grouping)

    def train_groups(self) -> None:
        """Train the adapters of all groups."""
        self.grouping = self.groups.train(self.grouping, self._know_groups)
        self.calibration.discard(self.num_calibration_runs())
        self._order_trainings()

    def _order_trainings(self) -> None:
        """Let the steps of trainings that were made side by side count on."""
        calibrating = self.calibration.training_names(self.num_calibration_runs())
        steps = map(step_name, range(self.context.args.boosting_steps))
        names = [BASELINE, *calibrating, *self.grouping.groups, *steps]
        run_on_main(lambda: self.context.run.order_trainings(names))

    def run_stage(self, name: str, shard: tuple[int, int] | None = None) -> None:
        """Run one stage, whose needs are there, beside other processes with other stages.

        Args:
            name (`str`): the stage; `"evaluation"` is [`train`].
            shard (`tuple[int, int]`, *optional*): which part of the gradients.
        """
        stage, _, part = name.partition(":")
        if stage == GRADIENTS:
            captured_gradients(self.context, self.training, shard)
        elif stage == BASELINE:
            self._train_baseline()
        elif stage == AT_BASELINE:
            gradients_at_baseline(self.context, self.training, shard)
        elif stage == CALIBRATION:
            self.calibration.run_stage(name, self.num_calibration_runs())
        elif stage == GROUP:
            self.group()
        else:
            self.grouping = run_on_main(lambda: self.context.run.read(Grouping))
            if stage == ADAPTER and self.groups.is_sequential:
                self.train_groups()
            elif stage == ADAPTER:
                self.groups.train_group(self.grouping, part)
            else:
                # Boosting steps count on from the adapters'.
                self._order_trainings()
                self._assemble(with_boosting=stage == BOOSTING)

    def _assemble(self, with_boosting: bool) -> None:
        """Weigh the adapters, and add boosting steps."""
        with self.context.model_state.restored():
            assembly = EnsembleAssembly(self.context, self.grouping)
            self.ensemble = assembly.assemble()
            if with_boosting:
                self.ensemble = self._boosting(assembly).run(self.ensemble)

    def _boosting(self, assembly: EnsembleAssembly) -> EnsembleBoosting:
        def estimator() -> SubsetEstimator:
            return self.calibration.selector(self.num_calibration_runs()).estimator

        return EnsembleBoosting(self.context, self.training, assembly, self.grouping, estimator)

    def _prepare(self) -> None:
        """Make what all choices rest on: gradients at the start, the one adapter for all, and gradients there."""
        # What helps a target is asked of trainings from the start, also where groups go on from that adapter.
        captured_gradients(self.context, self.training)
        if self.context.args.train_baseline:
            self._train_baseline()
        if self.context.args.group_initialization == "baseline":
            gradients_at_baseline(self.context, self.training)

    def _train_baseline(self) -> None:
        run = self.context.run
        with run.stage(BASELINE):
            baseline = self.training.run(BASELINE, self.context.tasks.names, run.baseline)
            self.calibration.score_trained(baseline, run.baseline, "Evaluating baseline")

    def selector(self) -> DataSelector:
        """Predictions of trainings from the start."""
        self._prepare()
        return self.calibration.selector(self.num_calibration_runs())

    def trainings(self) -> list[TrainedAdapter]:
        """The finished trainings that the ensemble rests on, in the order of their steps."""
        groups = () if self.grouping is None else self.grouping.groups
        steps = (step_name(number) for number in range(self.context.args.boosting_steps))
        names = {BASELINE, *groups, *steps, *self.calibration.training_names(self.num_calibration_runs())}
        return [own for own in run_on_main(self.context.run.trainings) if own.name in names]

    def _know_groups(self, grouping: Grouping) -> None:
        """Groups were chosen: their trainings can be announced."""
        self._adapters.parts = {
            name: 0.0
            if name == grouping.baseline_group
            else self.training.num_rows(grouping.trained_on(name)) * grouping.length_of(name) * TRAINING
            for name in grouping.groups
        }

    @property
    def _group_length(self) -> float:
        """Length of a group's training, in multiples of one from the start, before it is chosen."""
        args = self.context.args
        return args.continued_lengths()[0] if args.group_initialization == "baseline" else 1.0

    def num_calibration_runs(self) -> int:
        """The one adapter for all is a run that exists anyway."""
        return max(self.context.args.calibration_runs, int(self.context.args.train_baseline))

    def scores(self, tables: Mapping[str, Dataset]) -> dict[str, dict[str, TaskScores]]:
        """Scores of the base model, the ensemble, and the baseline where it was trained, by task."""
        systems = ["base", MAIN_SYSTEM, *([BASELINE] if self.context.args.train_baseline else [])]
        with self.context.model_state.restored():
            return {system: self.score_system(system, tables) for system in systems}

    def score_system(self, system: str, tables: Mapping[str, Dataset]) -> dict[str, TaskScores]:
        """Scores of one system of the run, whose cost is then among [`costs`]."""
        run, evaluation = self.context.run, self.evaluation
        if system == MAIN_SYSTEM:
            scores = evaluation.score_ensemble(self.ensemble, tables)
            self.costs[system] = self._cost()
        elif system == BASELINE:
            scores = evaluation.score_adapter(run.baseline, tables, "Evaluating baseline")
            trained = run_on_main(lambda: run.trained_adapter(BASELINE))
            self.costs[system] = system_cost([trained], [run.baseline], evaluation.forward)
        else:
            scores = evaluation.score_base(tables)
            self.costs[system] = system_cost([], [], evaluation.forward)
        return scores

    def _cost(self) -> SystemCost:
        """Of the ensemble that was scored last."""
        run, names = self.context.run, self.ensemble.adapter_names
        mixtures = self.grouping.mixtures
        trainings = run_on_main(
            lambda: {self.calibration.origin(name, mixtures[name]) if name in mixtures else name for name in names}
        )
        if self.context.args.group_initialization == "baseline":
            trainings.add(BASELINE)
        known = [own for own in run_on_main(run.trainings) if own.name in trainings]
        cost = system_cost(known, [run.member(name) for name in names], self.evaluation.forward)
        return replace(cost, training_flops=cost.training_flops + self._boosting_flops(known))

    def _boosting_flops(self, known: list[TrainedAdapter]) -> float:
        """Operations of all boosting steps, kept or not, but for those of trainings that are known."""
        run = self.context.run
        if not self.context.args.boosting_steps:
            return 0.0
        steps = run_on_main(lambda: run.read(Boosting)).steps
        own = {step.name for step in steps}
        return sum(step.flops for step in steps) - sum(trained.flops for trained in known if trained.name in own)

    def evaluate(self, tables: Mapping[str, Dataset], prefix: str, is_of_own_rows: bool = True) -> dict[str, float]:
        """Score the systems and report the scores; they are returned as flat metrics.

        What is not the run's own (`is_of_own_rows`) may not be reported, see [`SystemEvaluation.is_kept`].
        """
        start = time.time()
        if not run_on_main(lambda: self.evaluation.is_kept(prefix, tables, is_of_own_rows)):
            scores = self.scores(tables)
        else:
            with self.context.run.repeated(f"evaluation:{prefix}"):
                scores = self.scores(tables)
            self.report(prefix, scores)
        return flat_metrics(scores, prefix, MAIN_SYSTEM) | self.evaluation.speed(prefix, start, scores)

    @contextmanager
    def predictor(self, tables: Mapping[str, Dataset]) -> Iterator[TaskTrainer | TaskSFTTrainer]:
        """While open, a trainer that predicts with the ensemble."""
        with self.context.model_state.restored(), prediction_trainer(self.context, tables, self.ensemble) as trainer:
            yield trainer

    def report(self, prefix: str, scores: Mapping[str, Mapping[str, TaskScores]]) -> None:
        """Keep the scores of each system in the run, with what they come to, and renew the model card."""
        if is_main_process():
            self.context.run.write(Costs(dict(self.costs)))
            self.evaluation.keep(prefix, scores)
            renew_model_card(self.context.run, self.context.run.ensemble)
        wait_for_everyone()
