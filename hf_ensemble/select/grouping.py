"""Which tasks belong together: n tasks into m groups."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .._files import read_json, write_json
from ..errors import ConfigurationError
from ..estimate import SubsetEstimator
from .affinity import predicted_affinity
from .partition import semidefinite_partition, spectral_partition

GROUPING_METHODS = ("spectral", "semidefinite")


@dataclass(frozen=True)
class Grouping:
    """A partition of the tasks, and why.

    Args:
        groups (`dict[str, list[str]]`): tasks of each group, by the group's name.
        method (`str`): `"spectral"` or `"semidefinite"`.
        task_names (`list[str]`): order of the affinity's rows.
        affinity (`list[list[float]]`): see [`predicted_affinity`].
        predicted_loss (`dict[str, float]`): mean predicted validation loss over the tasks, by the number of groups.
        why (`str`): one sentence.
        settings (`dict`): everything needed to make this grouping again from the same features.
    """

    groups: dict[str, list[str]]
    method: str
    task_names: list[str]
    affinity: list[list[float]]
    predicted_loss: dict[str, float]
    why: str
    settings: dict

    def group_of(self, task: str) -> str:
        return next(name for name, tasks in self.groups.items() if task in tasks)

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Grouping":
        return cls(**read_json(Path(path)))


def partition_loss(estimator: SubsetEstimator, groups: Sequence[Sequence[str]]) -> float:
    """Mean over tasks of the predicted loss under the group that holds the task."""
    prediction = estimator.predict_subsets(groups)
    index = {name: i for i, name in enumerate(estimator.task_names)}
    return float(np.mean([prediction.loss[row, index[task]] for row, group in enumerate(groups) for task in group]))


def group_tasks(
    estimator: SubsetEstimator,
    num_groups: int | str = "auto",
    method: str = "spectral",
    max_groups: int | None = None,
    num_subsets: int = 400,
    subset_size: int | None = None,
    seed: int = 0,
) -> Grouping:
    """Partition the tasks by their predicted affinity.

    Args:
        estimator (`SubsetEstimator`): predictions.
        num_groups (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Groups. `"auto"` cuts the tasks into 1, 2, ... up to `max_groups` groups and keeps the cut with the least
            predicted loss; the semidefinite program's own number, from its trace penalty, is among the candidates.
        method (`str`, *optional*, defaults to `"spectral"`): `"spectral"` or `"semidefinite"`.
        max_groups (`int`, *optional*): most groups that `"auto"` considers; the number of tasks by default.
        num_subsets, subset_size, seed: see [`predicted_affinity`].

    Raises:
        `ConfigurationError`: for an unknown method or an impossible number of groups.
    """
    names = estimator.task_names
    if method not in GROUPING_METHODS:
        raise ConfigurationError(f"method has to be one of {GROUPING_METHODS}, found {method!r}.")
    if num_groups != "auto" and not (isinstance(num_groups, int) and 1 <= num_groups <= len(names)):
        raise ConfigurationError(f"num_groups has to be 'auto' or from 1 to {len(names)}, found {num_groups!r}.")
    affinity = predicted_affinity(estimator, num_subsets, subset_size, seed) if len(names) > 1 else np.zeros((1, 1))

    def cut(count: int | None) -> list[list[str]]:
        if method == "spectral" and count is not None:
            labels = spectral_partition(affinity, count, seed)
        else:
            labels, _ = semidefinite_partition(affinity, count)
        return [[name for name, own in zip(names, labels) if own == label] for label in range(labels.max() + 1)]

    if num_groups == "auto":
        most = min(max_groups or len(names), len(names))
        cuts = [cut(count) for count in range(1, most + 1)]
        if method == "semidefinite":
            own = cut(None)
            cuts += [own] if len(own) <= most else []
    else:
        cuts = [cut(num_groups)]
    losses = [partition_loss(estimator, groups) for groups in cuts]
    best = int(np.argmin(losses))
    curve: dict[str, float] = {}
    for groups, loss in zip(cuts, losses):
        curve[str(len(groups))] = min(loss, curve.get(str(len(groups)), np.inf))
    found = f"{len(cuts[best])} groups have the least predicted loss, {losses[best]:.4f}, of {len(cuts)} partitions"
    asked = f"{len(cuts[best])} groups were asked for; their predicted loss is {losses[best]:.4f}"
    return Grouping(
        groups={f"group_{i}": tasks for i, tasks in enumerate(cuts[best])},
        method=method,
        task_names=list(names),
        affinity=affinity.tolist(),
        predicted_loss=curve,
        why=f"{found if num_groups == 'auto' else asked}.",
        settings={
            "num_groups": num_groups,
            "max_groups": max_groups,
            "num_subsets": num_subsets,
            "subset_size": subset_size,
            "seed": seed,
            "l2_scale": estimator.regularization.l2_scale,
            "l2_evidence": estimator.regularization.evidence,
        },
    )
