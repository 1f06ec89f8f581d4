"""The weights of a batch's adapters, from the tasks of its rows."""

from collections.abc import Mapping, Sequence

import torch

from ...errors import EnsembleError
from ...tasks import LabelSpace

Tasks = str | Sequence[str | None] | None


def tasks_of_rows(task: Tasks, batch_size: int) -> list[str | None]:
    """The task of each row.

    Columns of datasets, arrays and series are taken as lists are.

    Raises:
        `EnsembleError`: for a list of another length than the batch, and for anything but names.
    """
    task = task.tolist() if hasattr(task, "tolist") else task
    tasks = list(task) if isinstance(task, Sequence) and not isinstance(task, str) else [task] * batch_size
    if not all(name is None or isinstance(name, str) for name in tasks):
        raise EnsembleError(f"Expected the name of a task, or one name for each row, found task={task!r:.60}.")
    if len(tasks) != batch_size:
        raise EnsembleError(f"Expected one task for each of {batch_size} rows, found {len(tasks)}.")
    return tasks


def weight_rows(
    tasks: Sequence[str | None],
    weights: Mapping[str, Mapping[str, float]],
    default: Mapping[str, float],
    names: Sequence[str],
    device: torch.device,
) -> torch.Tensor:
    """Weight of each adapter for each row, `(batch_size, adapters)`; rows of no known task get the default weights."""
    rows = [weights.get(task, default) for task in tasks]
    return torch.tensor([[float(row.get(name, 0.0)) for name in names] for row in rows], device=device)


def check_known(tasks: Sequence[str | None], known: Mapping[str, object]) -> None:
    """Raise [`EnsembleError`] for rows of no known task, for which no routing was asked."""
    unknown = sorted({name for name in tasks if name is not None and name not in known})
    if not unknown and (None not in tasks or not known):
        return
    found = f"found {unknown}" if unknown else "found none"
    raise EnsembleError(
        f"Expected the task of each row, one of {sorted(known)}; {found}. Pass task=..., or routing='default' for the "
        "default weights, or routing='prompt' for weights by how well each adapter predicts the prompt. For a pipeline "
        "pass model=ensemble.for_task(...)."
    )


def label_mask(
    task: Tasks, batch_size: int, label_space: LabelSpace | None, device: torch.device
) -> torch.Tensor | None:
    """Labels that each row of a classifier may answer with, bool `(batch_size, num_labels)`."""
    if label_space is None or task is None:
        return None
    tasks = tasks_of_rows(task, batch_size)
    known = [row for row, name in enumerate(tasks) if name in label_space.task_labels]
    mask = torch.ones(batch_size, len(label_space), dtype=torch.bool)
    mask[known] = label_space.mask([tasks[row] for row in known])
    return mask.to(device)
