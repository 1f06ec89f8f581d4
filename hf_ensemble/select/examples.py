"""Which training rows help a target, and which harm it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .._files import read_json, write_json
from ..errors import ConfigurationError
from ..estimate import SubsetEstimator
from ..estimate.mixtures import mixture_weights
from .problem import Targets, target_weights
from .provenance import caution, settings_of


@dataclass(frozen=True)
class ExampleScores:
    """How much each training row helps, and why one should believe it.

    Args:
        targets (`dict[str, float]`): what to do well on: weight of each task's loss.
        weights (`dict[str, float]`): the training: how often it draws a row of each task, the heaviest once.
        scores (`dict[str, dict[str, float]]`):
            For each task and example id, by how much the targets' predicted loss falls when the row is drawn once more;
            negative for rows that harm.
        why (`str`): one sentence.
        settings (`dict`): everything needed to score again from the same features.
    """

    targets: dict[str, float]
    weights: dict[str, float]
    scores: dict[str, dict[str, float]]
    why: str
    settings: dict

    def worst(self, share: float, tasks: Sequence[str] | None = None) -> dict[str, dict[str, str]]:
        """The rows with the lowest scores by task, the lowest first: ids, each with the reason.

        What [`TaskSet.without`] takes.

        Args:
            share (`float`): of each task's rows, from 0 to 1.
            tasks (`Sequence[str]`, *optional*): of these tasks; of all by default.

        Raises:
            `ConfigurationError`: for unknown tasks and shares.
        """
        if not 0 <= share <= 1:
            raise ConfigurationError(f"Expected a share from 0 to 1, found {share}.")
        unknown = sorted(set(tasks or ()) - set(self.scores))
        if unknown:
            raise ConfigurationError(f"Unknown tasks {unknown}; the tasks are {list(self.scores)}.")
        chosen = self.scores if tasks is None else tasks
        return {task: self._lowest(task, round(share * len(self.scores[task]))) for task in chosen}

    def harmful(self) -> dict[str, dict[str, str]]:
        """The rows with a negative score by task, the lowest first: ids, each with the reason."""
        return {task: self._lowest(task, sum(score < 0 for score in own.values())) for task, own in self.scores.items()}

    def _lowest(self, task: str, count: int) -> dict[str, str]:
        own = self.scores[task]
        targets = ", ".join(self.targets)
        return {
            example: f"score {own[example]:.2e}, {rank} of {len(own)} from below: drawn once more, it is predicted to "
            f"{'raise' if own[example] < 0 else 'lower'} the loss of {targets}"
            for rank, example in enumerate(sorted(own, key=own.get)[:count], start=1)
        }

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "ExampleScores":
        return cls(**read_json(Path(path)))


def score_examples(
    estimator: SubsetEstimator,
    targets: Targets,
    tasks: Sequence[str] | Mapping[str, float] | None = None,
) -> ExampleScores:
    """Score every training row by its influence on the targets' predicted loss.

    See [`SubsetEstimator.example_influence`] for the formula.

    Args:
        estimator (`SubsetEstimator`): predictions.
        targets (`str`, `Sequence[str]` or `dict[str, float]`): what to do well on; several count alike without weights.
        tasks (`Sequence[str]` or `dict[str, float]`, *optional*):
            The training that the rows are part of, with weights if it is a mixture; all tasks by default. The
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
    negative = int((influence < 0).sum())
    why = f"{negative} of {len(influence)} rows are predicted to raise the loss of {', '.join(goals)} when drawn more."
    return ExampleScores(
        goals,
        {name: float(weight) for name, weight in zip(names, weights) if weight},
        scores,
        why + caution(estimator),
        settings_of(estimator, {"tasks": tasks if tasks is None or isinstance(tasks, Mapping) else list(tasks)}),
    )
