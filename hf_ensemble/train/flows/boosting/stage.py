"""The boosting steps of a run, after its weights are fitted: each adds a member for the tasks that are answered worst.

Boosting comes after the weights, not before them: a step's residuals and its own weight are those of the ensemble that
is served. Weights that were fitted afterwards would change both.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset

from ...._files import checksums, remove_folder
from ...._records import digest_of
from ....capture import parameter_update, row_update
from ....ensemble import EnsembleMember, PeftEnsembleModel
from ....ensemble.saving.files import save_adapter
from ....ensemble.weighting.added_member import added_member
from ....ensemble.weighting.sampling import spread_sample
from ....estimate import LINEAR_METHODS, SubsetEstimator, linear_step
from ....estimate.mixtures import loss_weights
from ....evaluate import RowScores
from ....logging import get_logger
from ....models.usage import measured_usage
from ....runs import Boosting, BoostingStep
from ....runs.boosting import START, with_step
from ....select import Grouping
from ....store import GradientStore
from ....tasks import EXAMPLE_ID, TASK
from ...losses.step_loss import BesideEnsembleLoss, RowWeightedLoss, StepLoss
from ..adapter_training import AdapterTraining, rows_of
from ..assembly import EnsembleAssembly
from ..context import FlowContext
from ..evaluation import ensemble_scorer
from .held_out import added_answers

logger = get_logger(__name__)

# Training rows of each task that tell which tasks are answered worst, and whether a step has helped them.
_SAMPLED_ROWS = 100


def step_name(number: int) -> str:
    """Name of the member that a step adds."""
    return f"boost_{number}"


class EnsembleBoosting:
    """Adds members to an ensemble, step by step.

    Args:
        context (`FlowContext`): what the run works on.
        training (`AdapterTraining`): trains, and knows theta0.
        assembly (`EnsembleAssembly`): puts adapters on the model.
        grouping (`Grouping`): the groups.
        make_estimator (`Callable`): makes the run's estimator.
    """

    def __init__(
        self,
        context: FlowContext,
        training: AdapterTraining,
        assembly: EnsembleAssembly,
        grouping: Grouping,
        make_estimator: Callable[[], SubsetEstimator],
    ):
        self.context = context
        self.training = training
        self.assembly = assembly
        self._make_estimator = make_estimator
        self._estimator: SubsetEstimator | None = None
        if context.args.boosting_target == "task":
            self.targets = {task: [task] for task in context.tasks}
        else:
            self.targets = {name: list(tasks) for name, tasks in grouping.groups.items() if tasks}
        self._losses: dict[str, float] = {}

    def run(self, ensemble: PeftEnsembleModel) -> PeftEnsembleModel:
        """The ensemble with the steps that are kept, saved to the run.

        Args:
            ensemble (`PeftEnsembleModel`): the ensemble without them.
        """
        run, number = self.context.run, self.context.args.boosting_steps
        with run.stage("boosting", Boosting) as todo:
            # After an interruption, finished steps are in the record already.
            boosting = run.read_if_there(Boosting) or Boosting()
            if todo:
                if not run.member(START).exists():
                    self.training.reset()
                    save_adapter(self.context.model, self.context.adapter_name, run.member(START))
                while len(boosting.steps) < number:
                    current, began = self._boosted(ensemble, boosting), time.perf_counter()
                    with measured_usage() as usage:
                        target = self._worst(current, boosting)
                        if target is None:
                            logger.info("Boosting ends: no group or task is left whose last step has gained.")
                            break
                        step = self._step(current, step_name(len(boosting.steps)), target)
                    step = replace(step, flops=usage.flops, seconds=round(time.perf_counter() - began, 3))
                    logger.info("%s", _told(step))
                    boosting = Boosting([*boosting.steps, step])
                    run.write(boosting)
                self._remove_others(boosting)
                run.write(boosting)
        if not boosting.kept:
            return ensemble
        return self.assembly.save(self._boosted(ensemble, boosting))

    def _boosted(self, ensemble: PeftEnsembleModel, boosting: Boosting) -> PeftEnsembleModel:
        """The ensemble with the kept steps."""
        if not boosting.kept:
            return ensemble
        steps = [EnsembleMember(step.name, list(step.tasks), is_step=True) for step in boosting.kept]
        members = [*ensemble.members, *steps, EnsembleMember(START, [], is_step=True)]
        weights = boosting.weights(ensemble.weights, ensemble.scales)
        return self.assembly.ensemble(members, weights, ensemble.scales)

    def _remove_others(self, boosting: Boosting) -> None:
        """Delete the adapters of steps that were not kept."""
        names = [step.name for step in boosting.steps if not step.kept] + [START] * (not boosting.kept)
        for name in names:
            remove_folder(self.context.run.member(name))

    def _worst(self, ensemble: PeftEnsembleModel, boosting: Boosting) -> str | None:
        """The group or task with the highest training loss, of those whose last step was kept."""
        failed = {step.target for step in boosting.steps if not step.kept}
        left = [target for target in self.targets if target not in failed]
        for target in left:
            if target not in self._losses:
                self._losses[target] = self._training_loss(ensemble, self.targets[target])
        return max(left, key=self._losses.__getitem__, default=None)

    def _step(self, ensemble: PeftEnsembleModel, name: str, target: str) -> BoostingStep:
        """Make an adapter for the tasks, find its weight, and see what it gains."""
        context, tasks = self.context, self.targets[target]
        if context.args.boosting_method in LINEAR_METHODS:
            self._solve(ensemble, tasks, name)
        else:
            self._train(ensemble, tasks, name)
        members = [*self._members(ensemble, tasks), EnsembleMember(name, list(tasks), is_step=True)]
        weights = {task: ensemble.weights[task] for task in tasks}
        trial = self.assembly.ensemble(members, weights, ensemble.scales)
        tables = {task: context.eval_tables[task] for task in tasks}
        answers = added_answers(context, trial, {name: 1.0, START: -1.0}, tables)
        found = added_member(answers, context.args.seed)
        trial.weights = {
            task: with_step(row, name, found.weight / ensemble.scales.get(task, 1.0)) for task, row in weights.items()
        }
        before, after = self._losses[target], self._losses[target]
        if found.weight > 0:
            after = self._training_loss(trial, tasks)
        kept = found.is_gain and after < before
        self._losses[target] = after if kept else before
        return BoostingStep(
            name=name,
            target=target,
            tasks=list(tasks),
            method=context.args.boosting_method,
            kept=kept,
            weight=found.weight,
            validation_loss=found.loss_before,
            validation_loss_after=found.loss,
            gain=found.gain,
            standard_error=found.standard_error,
            training_loss=before,
            training_loss_after=after,
        )

    def _solve(self, ensemble: PeftEnsembleModel, tasks: list[str], name: str) -> None:
        """The step in the captured gradients, as an adapter."""
        context, args = self.context, self.context.args
        model, store = context.model, GradientStore(context.run.gradients)
        table = store.table("train", tasks)
        rows = rows_of(context.train_table, dict.fromkeys(tasks, 1.0))
        position = {key: i for i, key in enumerate(zip(rows[TASK], rows[EXAMPLE_ID]))}
        keys = zip((table.task_names[index] for index in table.task), table.example_id.tolist())
        # The store's order, without the rows that it excludes.
        rows = rows.select([position[key] for key in keys])
        margin = self._scores(ensemble, rows, args.margin).margin
        if self._estimator is None:
            self._estimator = self._make_estimator()
        estimator = self._estimator
        mixture = np.array([float(task in tasks) for task in estimator.task_names])
        sampling = np.array([context.tasks.sampling_weights[task] for task in table.task_names])
        drawn = (sampling * table.rows_per_captured)[table.task]
        step = linear_step(
            table.features,
            margin,
            estimator.penalty(mixture),
            args.boosting_method,
            loss_weights(table, args.task_loss_weighting, sampling) * drawn,
            args.num_components,
        )
        with context.model_state.restored():
            self.training.reset()
            if store.dim == sum(own.numel() for own in self.training.theta0.values()):
                update = parameter_update(model, store, step.coefficients)
            else:
                batch_size = context.capture_config().batch_size
                update = row_update(
                    model, store, rows, step.row_coefficients, context.data_collator, batch_size, context.label_space
                )
            try:
                with torch.no_grad():
                    for key, parameter in model.named_parameters():
                        if key in update:
                            parameter.add_(update[key].to(parameter.device, parameter.dtype))
                save_adapter(model, context.adapter_name, context.run.member(name))
            finally:
                self.training.reset()

    def _train(self, ensemble: PeftEnsembleModel, tasks: list[str], name: str) -> None:
        """The step by an ordinary training on the tasks' rows."""
        context, method = self.context, self.context.args.boosting_method
        members = self._members(ensemble, tasks)
        weights = {task: ensemble.weights[task] for task in tasks}
        files = {member.name: checksums(context.run.member(member.name)) for member in members}
        identity = digest_of([method, weights, {task: ensemble.scales.get(task, 1.0) for task in tasks}, files])
        loss: StepLoss
        if method == "adaboost":
            rows = rows_of(context.train_table, dict.fromkeys(tasks, 1.0))
            pull = np.exp(-self._scores(ensemble, rows).margin / 2)
            loss = RowWeightedLoss(dict(zip(zip(rows[TASK], rows[EXAMPLE_ID]), pull / pull.mean())), identity)
        else:
            beside = self.assembly.ensemble(members, weights, ensemble.scales)
            loss = BesideEnsembleLoss(beside, START, identity, is_regression=method == "residuals")
        self.training.run(name, tasks, context.run.member(name), loss=loss)

    def _members(self, ensemble: PeftEnsembleModel, tasks: list[str]) -> list[EnsembleMember]:
        """The members that answer some tasks, and the start that a step's logits are taken from."""
        used = {name for task in tasks for name, weight in ensemble.weights[task].items() if weight} - {START}
        members = [member for member in ensemble.members if member.name in used]
        return [*members, EnsembleMember(START, [], is_step=True)]

    def _training_loss(self, ensemble: PeftEnsembleModel, tasks: list[str]) -> float:
        """Mean over the tasks of the loss on a sample of their training rows."""
        losses = []
        for task in tasks:
            rows = rows_of(self.context.train_table, {task: 1.0})
            rows = rows.select(spread_sample(len(rows), _SAMPLED_ROWS, self.context.args.seed))
            losses.append(self._scores(ensemble, rows).loss.mean())
        return float(np.mean(losses))

    def _scores(self, ensemble: PeftEnsembleModel, rows: Dataset, margin: str = "geometric_mean") -> RowScores:
        return self.context.evaluator.score_rows(ensemble_scorer(ensemble), rows, margin)


def _told(step: BoostingStep) -> str:
    fate = "kept" if step.kept else "not kept"
    noise = "unknown" if step.standard_error is None else f"{step.standard_error:.4f}"
    return (
        f"Boosting step {step.name} for {step.target}, weight {step.weight:.2f}: validation loss "
        f"{step.validation_loss:.4f} -> {step.validation_loss_after:.4f}, gain on rows it was not fitted to "
        f"{step.gain:.4f} (standard error {noise}); training loss {step.training_loss:.4f} -> "
        f"{step.training_loss_after:.4f}: {fate}."
    )
