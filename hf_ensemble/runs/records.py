"""What the files of a run hold."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .._files import checksums
from .._records import Record, digest_of
from ..errors import RecordError
from ..estimate import ObservedRun, SubsetEstimator
from ..evaluate import TaskScores
from ..select import Grouping, LeftOut, predicted_losses
from ..select.left_out import effects_of_leaving_out
from ..tasks import TaskSet
from ..tasks.presentation import example_prompt, hub_datasets
from .costs import StageCost


@dataclass(frozen=True)
class StageRecord:
    """How far a stage is.

    Args:
        status (`str`): `"begun"` or `"done"`.
        cost (`StageCost`, *optional*): what it took; `None` for one that is not done.
        is_resumed (`bool`): whether it was interrupted; its cost is then of the work that was kept.
    """

    status: Literal["begun", "done"]
    cost: StageCost | None = None
    is_resumed: bool = False


@dataclass(frozen=True)
class RunRecord(Record):
    """What a run was configured with, and which of its stages are done.

    Args:
        configuration (`dict`): what every stage depends on; under `"capture"`, what trainings do not.
        choices (`dict`): what only the choice of groups or tasks, and the stages after it, depend on.
        versions (`dict[str, str]`): packages that decide the result.
        stages (`dict[str, StageRecord]`): the stages begun so far.
    """

    format = "hf_ensemble.run"
    format_version = 2

    configuration: dict[str, Any]
    choices: dict[str, Any]
    versions: dict[str, str]
    stages: dict[str, StageRecord] = field(default_factory=dict)

    def stage_costs(self) -> dict[str, StageCost]:
        """What each finished stage took."""
        return {name: stage.cost for name, stage in self.stages.items() if stage.cost is not None}

    def identity(self, with_choices: bool, with_capture: bool = True) -> str:
        """What tells the files of this run from those of others: a digest of the configuration, and of the choices."""
        data = self.to_dict()
        configuration = {key: own for key, own in data["configuration"].items() if with_capture or key != "capture"}
        return digest_of([configuration, data["choices"] if with_choices else None])[:32]


@dataclass(frozen=True)
class TaskRecord:
    """One task of a run.

    Args:
        num_rows (`dict[str, int]`): rows of each split.
        fingerprints (`dict[str, str]`): of each split's rows and their order.
        label_names (`list[str]`, *optional*): labels of a classification task.
        sampling_weight (`float`): how often training draws one of its rows, relative to the other tasks.
        is_streamed (`bool`): whether trainings go on to further training rows, of which these are the first.
        example (`str` or `list[dict]`, *optional*): a prompt that the model card may show.
        hub_datasets (`list[str]`): ids of the Hub's datasets that the rows come from, where that is known.
    """

    num_rows: dict[str, int]
    fingerprints: dict[str, str]
    label_names: list[str] | None
    sampling_weight: float
    is_streamed: bool = False
    example: str | list[dict[str, str]] | None = None
    hub_datasets: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TasksRecord(Record):
    """The tasks of a run.

    Args:
        row_format (`str`): what the rows hold, see [`TaskSet`].
        fingerprint (`str`): of all rows.
        tasks (`dict[str, TaskRecord]`): the tasks by name.
        task_loss_weighting (`str`): what the trainings average the loss of a step over.
    """

    format = "hf_ensemble.tasks"
    format_version = 3

    row_format: str
    fingerprint: str
    tasks: dict[str, TaskRecord]
    task_loss_weighting: str = "tokens"

    @classmethod
    def of(cls, tasks: TaskSet, task_loss_weighting: str, with_examples: bool = True) -> "TasksRecord":
        """Of tasks and the average of a step's loss; with a prompt of each task unless rows are not to be shown."""
        data = tasks.to_dict()
        return cls(
            data["row_format"],
            data["fingerprint"],
            {
                name: TaskRecord(
                    **own,
                    example=example_prompt(tasks[name]) if with_examples else None,
                    hub_datasets=hub_datasets(tasks[name].splits.values()),
                )
                for name, own in data["tasks"].items()
            },
            task_loss_weighting,
        )


@dataclass(frozen=True)
class TrainedAdapter(Record):
    """One training of an adapter.

    Args:
        name (`str`): name of the training.
        mixture (`dict[str, float]`): weight of each task's rows; tasks left out were not trained on.
        seed (`int`): seed of the order of the rows and of dropout.
        theta0 (`str`): fingerprint of the parameters that it begins at.
        first_step (`int`): optimizer steps of the run's trainings before this one; trackers count on from there.
        status (`str`): `"training"` or `"done"`; the figures below are known once it is done.
        num_examples (`int`): training rows.
        global_step (`int`): optimizer steps.
        training_loss (`float`): mean over the steps.
        distance (`float`): Euclidean norm of the trained parameters' move away from theta0.
        total_flos (`float`): floating point operations, as `Trainer` estimates them.
        flops (`float`): floating point operations of its forward and backward passes, see [`FlopCounter`].
        tokens (`int`): tokens that it was trained on, padding apart; in every epoch anew.
        padding (`int`): tokens of padding that were computed beside them.
        num_parameters (`int`): parameters that were trained.
        epoch (`float`): epochs up to the adapter that was kept.
        best_step (`int`, *optional*):
            The step whose adapter was kept because its evaluation was the best (`load_best_model_at_end`); `None` where
            that of the last step was kept.
        best_metric (`float`, *optional*): of that evaluation.
        metric_for_best_model (`str`, *optional*): name of that metric in the training's log.
        seconds (`float`): wall time; of a training that was resumed, without what was lost since its checkpoint.
        length (`float`): its epochs or steps, in multiples of those of the arguments.
        batch_size (`int`): rows that are drawn at a time, by all processes together.
        loss (`str`): `"own"` for the trainer's own loss; of a boosting step, what it was trained beside, as a digest.
        files (`dict[str, str]`): checksums of the adapter's files.
        log_history (`list[dict]`): the training's log, as `TrainerState` has it.
    """

    format = "hf_ensemble.trained_adapter"
    format_version = 4

    name: str
    mixture: dict[str, float]
    seed: int
    theta0: str
    first_step: int = 0
    status: Literal["training", "done"] = "training"
    num_examples: int = 0
    global_step: int = 0
    training_loss: float | None = None
    distance: float = 0.0
    total_flos: float = 0.0
    flops: float = 0.0
    tokens: int = 0
    padding: int = 0
    num_parameters: int = 0
    epoch: float = 0.0
    best_step: int | None = None
    best_metric: float | None = None
    metric_for_best_model: str | None = None
    seconds: float = 0.0
    length: float = 1.0
    batch_size: int = 0
    loss: str = "own"
    files: dict[str, str] = field(default_factory=dict)
    log_history: list[dict[str, Any]] = field(default_factory=list)

    def continues(self, known: "TrainedAdapter | None") -> bool:
        """Whether what is known of a training is of this one: same rows, seed, starting point, length and loss."""
        compared = ("name", "mixture", "seed", "theta0", "length", "loss")
        return known is not None and all(getattr(known, name) == getattr(self, name) for name in compared)

    def check_files(self, folder: Path) -> None:
        """Make sure that an adapter's files are those that the training has written.

        Raises:
            `RecordError`: for other ones.
        """
        found = checksums(folder)
        altered = [name for name, checksum in self.files.items() if found.get(name) != checksum]
        if altered:
            raise RecordError(
                f"{str(folder / altered[0])!r} is not what the training {self.name!r} has written: it is damaged or "
                f"was replaced. Delete the folder {str(folder)!r} to train the adapter again, or restore the file."
            )


@dataclass(frozen=True)
class ScoredRun(Record):
    """A fine-tuning of the run with its scores: evidence for the estimates, or their test.

    Args:
        mixture (`dict[str, float]`): weight of each task's rows; tasks left out were not trained on.
        seed (`int`): seed of the training.
        scores (`dict[str, TaskScores]`): validation scores of every task.
        seconds (`float`): wall time of the training and its scoring.
        distance (`float`): Euclidean norm of the trained parameters' move away from theta0.
        theta0 (`str`): fingerprint of the parameters that the training began at.
        length (`float`): its epochs or steps, in multiples of those of the arguments.
        captured_losses (`dict[str, float]`):
            Mean validation loss of the rows that gradients are captured of, for tasks that have more.
    """

    format = "hf_ensemble.scored_run"
    format_version = 3

    mixture: dict[str, float]
    seed: int
    scores: dict[str, TaskScores]
    seconds: float
    distance: float
    theta0: str
    length: float = 1.0
    captured_losses: dict[str, float] = field(default_factory=dict)

    @property
    def subset(self) -> list[str]:
        """The tasks that it was trained on."""
        return [task for task, weight in self.mixture.items() if weight > 0]

    def as_observed(self) -> ObservedRun:
        """The evidence that an estimate takes."""
        return ObservedRun(self.mixture, {task: own.loss for task, own in self.scores.items()}, self.captured_losses)


@dataclass(frozen=True)
class Estimate(Record):
    """What the choice of groups rests on.

    Args:
        l2_scale (`float`): the constant c of the surrogate's penalty.
        l2_evidence (`str`): `"observed_runs"`, `"replay"` or `"validation_loss"`.
        l2_criterion (`float`, *optional*): its error on the evidence.
        calibration_subsets (`list[list[str]]`): what the runs that calibrate were trained on.
        calibration (`dict`, *optional*): factors of the tasks' losses and their curvature; `None` without a run.
        num_components (`int`): principal components that the surrogate is solved in.
        base_loss (`dict[str, float]`): validation loss of each task at theta0.
        predicted_loss (`dict[str, dict[str, float]]`):
            Of each task under each group; with a scale of the task's outputs where the groups were chosen with one.
        left_out (`dict[str, LeftOut]`): by the task that is left out; empty for one task and for more than 200.
    """

    format = "hf_ensemble.estimate"
    format_version = 3

    l2_scale: float
    l2_evidence: str
    l2_criterion: float | None
    calibration_subsets: list[list[str]]
    calibration: dict[str, Any] | None
    num_components: int
    base_loss: dict[str, float]
    predicted_loss: dict[str, dict[str, float]]
    left_out: dict[str, LeftOut] = field(default_factory=dict)

    @classmethod
    def of(cls, estimator: SubsetEstimator, grouping: Grouping) -> "Estimate":
        names = list(estimator.task_names)
        is_scaled = grouping.settings["output_scales"] and grouping.method == "mixtures" and estimator.can_be_scaled
        losses = predicted_losses(estimator.scaled() if is_scaled else estimator, grouping)
        regularization, calibration = estimator.regularization, estimator.calibration
        return cls(
            l2_scale=float(regularization.l2_scale),
            l2_evidence=regularization.evidence,
            l2_criterion=regularization.criterion,
            calibration_subsets=[list(run.mixture) for run in estimator.observed_runs],
            calibration=None if calibration is None else calibration.by_task(estimator.task_names),
            num_components=int(estimator.reduction.components.shape[1]),
            base_loss=dict(zip(names, estimator.base_loss().tolist())),
            predicted_loss={group: dict(zip(names, row)) for group, row in zip(grouping.groups, losses.tolist())},
            left_out=effects_of_leaving_out(estimator),
        )


@dataclass(frozen=True)
class ConcurrencyTrial:
    """Passes of several groups at once, and those of the same groups one after the other.

    Args:
        num_at_once (`int`): number of groups.
        seconds (`list[float]`): of each round at once, a pass forward and backward of every group.
        seconds_alone (`list[float]`): of each round one after the other.
    """

    num_at_once: int
    seconds: list[float]
    seconds_alone: list[float]

    @property
    def speed_up(self) -> float:
        """How many times as fast the passes are at once, by the medians of the rounds."""
        return statistics.median(self.seconds_alone) / statistics.median(self.seconds)


@dataclass(frozen=True)
class Concurrency(Record):
    """How many groups `concurrent_groups="auto"` trains at once, and why.

    Args:
        num_at_once (`int`): number of groups; 1 trains one after the other.
        reason (`str`): what decided.
        trials (`list[ConcurrencyTrial]`): what was measured.
    """

    format = "hf_ensemble.concurrency"

    num_at_once: int
    reason: str
    trials: list[ConcurrencyTrial] = field(default_factory=list)


@dataclass(frozen=True)
class EnsembleWeights(Record):
    """Weight of each adapter, by task.

    Args:
        weights (`dict[str, dict[str, float]]`): adapters left out weigh 0.
        losses (`dict[str, dict[str, float]]`, *optional*):
            Where weights were fitted: validation loss of each task with the `fitted` weights, with equal ones
            (`uniform`) and with the best single adapter (`one_hot`), on the rows that they were fitted to.
        scales (`dict[str, float]`, *optional*): what a task's combined logits are multiplied by, where it is not 1.
        cross_validated (`dict[str, dict[str, float]]`, *optional*):
            Where weights were cross-validated: loss of each task on the rows that weights were not fitted to, with
            each candidate and with the `chosen` weights, see [`CrossValidation`].
        shares (`dict[str, dict[str, float]]`, *optional*): share of each candidate in a task's weights.
        answered (`dict[str, dict[str, float]]`, *optional*):
            Where weights were chosen by generated answers: the metric of each task with each of the weights it was
            chosen from (`fitted`, `own_group`, `one_hot`, `uniform`).
    """

    format = "hf_ensemble.ensemble_weights"
    format_version = 3

    weights: dict[str, dict[str, float]]
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    cross_validated: dict[str, dict[str, float]] = field(default_factory=dict)
    shares: dict[str, dict[str, float]] = field(default_factory=dict)
    answered: dict[str, dict[str, float]] = field(default_factory=dict)
