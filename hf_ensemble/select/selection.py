"""`Selection`: the tasks selected for a target."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from .choice import Choice


@dataclass(frozen=True)
class Selection(Choice):
    """The tasks selected to train on.

    Args:
        targets (`dict[str, float]`): weight of each target task's score.
        tasks (`list[str]`): tasks to train on: required ones first, then the others, most helpful first.
        method (`str`): selection method, see [`DataSelector.select`].
        scores (`dict[str, float]`):
            Score of each task that was considered, lower is better. Forward: predicted score with the task added, at
            the last step that considered it. Backward: score with the task minus the score without it, at the last step
            that considered it. Random ensemble: mean over the random subsets that contain it. Exhaustive: score of the
            best subset that contains it. Mixture: score with this task as the only auxiliary. Similarities: negative
            mean cosine.
        path (`list[dict]`):
            Steps of the search: the task `added` or `removed`, the `predicted_loss` of the targets, the `interval` that
            contains the true loss with probability `level` (both `None` without an observed run) and `close_calls`, the
            alternatives that the validation rows cannot distinguish from this one. Where generated answers decide, also
            the metric `answered` with the predicted parameters, and `verified`, that of every candidate verified.
        summary (`str`): one sentence.
        settings (`dict`): everything needed to repeat this selection from the same features.
        weights (`dict[str, float]`, *optional*):
            Sampling weight of each task, relative to the task's own. All 1 by default.
        baselines (`dict[str, float]`, *optional*):
            Predicted loss of the targets with simpler choices: all tasks, the targets alone, and the same number of
            random or most similar tasks.
    """

    format: ClassVar[str] = "hf_ensemble.selection"
    made_by: ClassVar[str] = "select"

    targets: dict[str, float]
    tasks: list[str]
    method: str
    scores: dict[str, float]
    path: list[dict[str, Any]]
    weights: dict[str, float] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if not self.weights:
            object.__setattr__(self, "weights", dict.fromkeys(self.tasks, 1.0))

    @property
    def auxiliary(self) -> list[str]:
        """The selected tasks that are not targets."""
        return [task for task in self.tasks if task not in self.targets]

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of [`DataSelector.select`] that repeat the selection."""
        return {"target": self.targets, "method": self.method, **super().arguments()}
