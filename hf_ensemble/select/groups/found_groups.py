"""What every method of grouping gives."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class FoundGroups:
    """Groups as a method finds them; see [`Grouping`].

    Args:
        labels (`np.ndarray` of shape `(T,)`): the group that serves each task.
        mixtures (`np.ndarray` of shape `(G, T)`): weights that each group's adapter is trained with.
        curve (`dict[str, float]`): mean predicted loss by number of groups.
        cost (`float`): training cost of all adapters.
        summary (`str`): one sentence.
        names (`list[str]`): name of each group.
        lengths (`np.ndarray` of shape `(G,)`): of the groups' trainings, in multiples of a whole one.
        baseline (`int`, *optional*): the group whose adapter is the one for all tasks.
        cost_curve (`list[dict[str, float]]`, *optional*): see [`Grouping`].
        expected_loss (`float`, *optional*): see [`Grouping`].
    """

    labels: np.ndarray
    mixtures: np.ndarray
    curve: dict[str, float]
    cost: float
    summary: str
    names: list[str]
    lengths: np.ndarray
    baseline: int | None = None
    cost_curve: list[dict[str, float]] = field(default_factory=list)
    expected_loss: float | None = None
