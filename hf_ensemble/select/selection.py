"""`Selection`: the tasks chosen for a target, and why."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .._files import read_json, write_json


@dataclass(frozen=True)
class Selection:
    """The tasks chosen to train with, and why.

    Args:
        targets (`dict[str, float]`): what to do well on: weight of each task's score.
        tasks (`list[str]`): the tasks to train on: those that had to be in, then the others, the most helpful first.
        method (`str`): name of the method, see [`DataSelector.select`].
        scores (`dict[str, float]`):
            One per task that was weighed, lower is better. Forward: predicted score of the last step that weighed the
            task, with it added. Backward: score with the task less the score without it, when it was last weighed.
            Random ensemble: mean over the random subsets that hold it. Exhaustive: of the best subset that holds it.
            Mixture: with this task alone beside the targets. Similarities: the mean cosine, negated.
        path (`list[dict]`):
            The steps of the search: what was `added` or `removed`, the `predicted_loss` of the targets with the
            `interval` that holds the true loss in 90 of 100 cases (`None` without a run that calibrates), and
            `close_calls`, the choices that cannot be told from this one by the validation rows.
        why (`str`): one sentence.
        settings (`dict`): everything needed to make this selection again from the same features.
        weights (`dict[str, float]`, *optional*):
            How often training draws a row of each task, times the task's own sampling weight; alike by default.
        baselines (`dict[str, float]`, *optional*):
            Predicted loss of the targets with simpler choices: all tasks, the targets alone, random tasks and the most
            similar ones, the latter two as many as were chosen.
    """

    targets: dict[str, float]
    tasks: list[str]
    method: str
    scores: dict[str, float]
    path: list[dict[str, Any]]
    why: str
    settings: dict[str, Any]
    weights: dict[str, float] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if not self.weights:
            object.__setattr__(self, "weights", dict.fromkeys(self.tasks, 1.0))

    @property
    def auxiliary(self) -> list[str]:
        return [task for task in self.tasks if task not in self.targets]

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Selection":
        return cls(**read_json(Path(path)))
