"""Which training rows help a target, and which harm it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .._settings import check_number, checked_names
from ..estimate import SubsetEstimator
from ..estimate.mixtures import mixture_weights
from .choice import Choice, calibration_note, with_provenance
from .problem import Targets, target_weights


@dataclass(frozen=True)
class ExampleScores(Choice):
    """Influence of each training row on the targets' predicted loss.

    Args:
        targets (`dict[str, float]`): weight of each target task's loss.
        weights (`dict[str, float]`): sampling weights of the training that the rows are part of; the largest is 1.
        scores (`dict[str, dict[str, float]]`):
            For each task and example id, how much the targets' predicted loss falls when the row is sampled once more.
            Negative for harmful rows. Rows whose gradients were not captured have no entry.
        num_rows (`dict[str, int]`): number of training rows of each task, captured or not.
        summary (`str`): one sentence.
        settings (`dict`): everything needed to score the rows again from the same features.
    """

    format: ClassVar[str] = "hf_ensemble.example_scores"
    format_version: ClassVar[int] = 2
    made_by: ClassVar[str] = "score_examples"

    targets: dict[str, float]
    weights: dict[str, float]
    scores: dict[str, dict[str, float]]
    num_rows: dict[str, int]

    def num_without_score(self) -> dict[str, int]:
        """Number of rows of each task that have no score, because their gradients were not captured; only such tasks.

        `capture_rows` of [`CaptureConfig`] is how many are captured.
        """
        lacking = {task: count - len(self.scores[task]) for task, count in self.num_rows.items()}
        return {task: count for task, count in lacking.items() if count}

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of [`DataSelector.score_examples`] that repeat the scores."""
        return {"targets": self.targets, **super().arguments()}

    def worst(self, share: float, tasks: Sequence[str] | None = None) -> dict[str, dict[str, str]]:
        """The lowest-scoring rows of each task, lowest first: a reason by example id, for [`TaskSet.without`].

        Args:
            share (`float`): share of each task's rows with a score, from 0 to 1.
            tasks (`Sequence[str]`, *optional*): the tasks to look at. All by default.

        Raises:
            `ConfigurationError`: for unknown tasks, and shares out of range.
        """
        check_number("share", share, 0, 1)
        chosen = self.scores if tasks is None else checked_names("tasks", tasks, self.scores)
        return {task: self._lowest(task, round(share * len(self.scores[task]))) for task in chosen}

    def harmful(self) -> dict[str, dict[str, str]]:
        """The rows of each task with a negative score, lowest first: a reason by example id."""
        return {task: self._lowest(task, sum(score < 0 for score in own.values())) for task, own in self.scores.items()}

    def _lowest(self, task: str, count: int) -> dict[str, str]:
        own = self.scores[task]
        targets = ", ".join(self.targets)
        return {
            example: f"score {own[example]:.2e}, rank {rank} of {len(own)} from the bottom: sampling it once more is "
            f"predicted to {'raise' if own[example] < 0 else 'lower'} the loss of {targets}"
            for rank, example in enumerate(sorted(own, key=own.get)[:count], start=1)
        }


def score_examples(
    estimator: SubsetEstimator,
    targets: Targets,
    tasks: Sequence[str] | Mapping[str, float] | None = None,
) -> ExampleScores:
    """Score every training row by its influence on the targets' predicted loss.

    See [`SubsetEstimator.example_influence`] for the formula.

    Args:
        estimator (`SubsetEstimator`): makes the predictions.
        targets (`str`, `Sequence[str]` or `dict[str, float]`):
            Task or tasks whose loss counts, with equal or given weights.
        tasks (`Sequence[str]` or `dict[str, float]`, *optional*):
            The training that the rows are part of, with weights if it is a mixture. All tasks by default. The
            estimator's sampling weights multiply them. Rows of other tasks are scored as additions.

    Raises:
        `ConfigurationError`: for unknown targets.
        `EstimationError`: for unknown tasks, and weights that are negative or all zero.
    """
    names = estimator.task_names
    goals = target_weights(targets, estimator)
    weights = mixture_weights(names if tasks is None else tasks, names) * estimator.sampling_weights
    weights = weights / (weights.max() or 1.0)
    influence = estimator.example_influence(weights, mixture_weights(goals, names))
    scores: dict[str, dict[str, float]] = {name: {} for name in names}
    for (task, example), value in zip(estimator.training_ids, influence.tolist()):
        scores[task][example] = value
    num_rows = dict(zip(names, estimator.counts.tolist()))
    every, scored = sum(num_rows.values()), len(influence)
    which = f"{scored} rows" if scored == every else f"{scored} rows that were captured, of {every},"
    summary = (
        f"Sampling {int((influence < 0).sum())} of the {which} more often is predicted to raise the loss of "
        f"{', '.join(goals)}."
    )
    arguments = {"tasks": tasks if tasks is None or isinstance(tasks, Mapping) else list(tasks)}
    return ExampleScores(
        goals,
        {name: float(weight) for name, weight in zip(names, weights) if weight},
        scores,
        num_rows,
        summary=summary + calibration_note(estimator),
        settings=with_provenance(arguments, estimator),
    )
