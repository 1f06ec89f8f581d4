"""Which auxiliary tasks help a target."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from .._files import read_json, write_json
from ..errors import ConfigurationError
from ..estimate import SubsetEstimator
from .provenance import caution, settings_of
from .sampling import random_subsets


@dataclass(frozen=True)
class Selection:
    """The tasks chosen to train with, and why.

    Args:
        target (`str`): the task to do well on.
        tasks (`list[str]`): the target and the auxiliary tasks chosen, the most helpful first.
        method (`str`): `"forward"` or `"random_ensemble"`.
        scores (`dict[str, float]`):
            One per auxiliary task, lower is better. Forward: predicted target loss of the last step that weighed the
            task, with it added. Random ensemble: mean predicted target loss over the random subsets that hold it.
            Mixture: predicted target loss with this auxiliary task alone.
        path (`list[dict]`): the steps of the search, each with its predicted target loss.
        why (`str`): one sentence.
        settings (`dict`): everything needed to make this selection again from the same features.
        weights (`dict[str, float]`, *optional*):
            How often training draws a row of each task, times the task's own sampling weight; alike by default.
    """

    target: str
    tasks: list[str]
    method: str
    scores: dict[str, float]
    path: list[dict]
    why: str
    settings: dict
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if not self.weights:
            object.__setattr__(self, "weights", dict.fromkeys(self.tasks, 1.0))

    @property
    def auxiliary(self) -> list[str]:
        return [task for task in self.tasks if task != self.target]

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Selection":
        return cls(**read_json(Path(path)))


def check_target(estimator: SubsetEstimator, target: str) -> int:
    """Index of the target. Raises `ConfigurationError` for an unknown one."""
    if target not in estimator.task_names:
        raise ConfigurationError(f"Unknown target {target!r}; the tasks are {list(estimator.task_names)}.")
    return estimator.task_names.index(target)


def forward_selection(estimator: SubsetEstimator, target: str, max_tasks: int | None = None) -> Selection:
    """Add, step by step, the task whose addition lowers the target's predicted loss most; stop when none does.

    Args:
        estimator (`SubsetEstimator`): predictions.
        target (`str`): the task to do well on; it is always in.
        max_tasks (`int`, *optional*): auxiliary tasks to take at most.
    """
    names, column = estimator.task_names, check_target(estimator, target)
    chosen = np.eye(len(names))[column]
    best = float(estimator.predict(chosen).loss[0, column])
    path = [{"added": target, "predicted_loss": best}]
    tasks, scores = [target], {}
    limit = len(names) - 1 if max_tasks is None else max_tasks
    while len(tasks) - 1 < limit:
        candidates = [i for i in range(len(names)) if not chosen[i]]
        if not candidates:
            break
        losses = estimator.predict(chosen + np.eye(len(names))[candidates]).loss[:, column]
        scores.update({names[i]: float(loss) for i, loss in zip(candidates, losses)})
        winner = int(np.argmin(losses))
        if losses[winner] >= best:
            break
        best = float(losses[winner])
        chosen[candidates[winner]] = 1.0
        tasks.append(names[candidates[winner]])
        path.append({"added": tasks[-1], "predicted_loss": best})
    why = (
        f"Predicted validation loss of {target} falls from {path[0]['predicted_loss']:.4f} alone to {best:.4f} with "
        f"{', '.join(tasks[1:])}."
        if len(tasks) > 1
        else f"No task is predicted to lower the validation loss of {target} ({best:.4f})."
    )
    return Selection(
        target,
        tasks,
        "forward",
        scores,
        path,
        why + caution(estimator),
        settings_of(estimator, {"max_tasks": max_tasks}),
    )


def random_ensemble_selection(
    estimator: SubsetEstimator,
    target: str,
    max_tasks: int | None = None,
    num_subsets: int = 500,
    subset_size: int | None = None,
    seed: int = 0,
) -> Selection:
    """Score each task by the mean predicted target loss of the random subsets that hold it (GradEx, arXiv 2409.19458).

    Every subset holds the target. A task is taken when its score is below the mean of all subsets, the best `max_tasks`
    of these.

    Args:
        estimator (`SubsetEstimator`): predictions.
        target (`str`): the task to do well on.
        max_tasks (`int`, *optional*): auxiliary tasks to take at most.
        num_subsets (`int`, *optional*, defaults to 500): random subsets.
        subset_size (`int`, *optional*): auxiliary tasks of a subset; a third of them by default.
        seed (`int`, *optional*, defaults to 0): seed of the subsets.
    """
    names, column = estimator.task_names, check_target(estimator, target)
    auxiliary = [i for i in range(len(names)) if i != column]
    if not auxiliary:
        return forward_selection(estimator, target)
    size = subset_size or max(1, round(len(auxiliary) / 3))
    mixtures = np.zeros((num_subsets, len(names)))
    mixtures[:, column] = 1.0
    mixtures[:, auxiliary] = random_subsets(len(auxiliary), size, num_subsets, seed)
    losses = estimator.predict(mixtures).loss[:, column]
    held = mixtures[:, auxiliary]
    means = (held * losses[:, None]).sum(0) / np.maximum(held.sum(0), 1)
    threshold = float(losses.mean())
    order = np.argsort(means)
    taken = [int(i) for i in order if held[:, i].any() and means[i] < threshold][:max_tasks]
    scores = {names[auxiliary[i]]: float(means[i]) for i in order}
    tasks = [target] + [names[auxiliary[i]] for i in taken]
    path = [{"added": names[auxiliary[i]], "predicted_loss": float(means[i])} for i in taken]
    why = (
        f"Over {num_subsets} random subsets of {size} tasks, the mean predicted loss of {target} is {threshold:.4f}; "
        f"subsets that hold the chosen tasks are below."
    )
    settings = {"max_tasks": max_tasks, "num_subsets": num_subsets, "subset_size": size, "seed": seed}
    return Selection(
        target, tasks, "random_ensemble", scores, path, why + caution(estimator), settings_of(estimator, settings)
    )
