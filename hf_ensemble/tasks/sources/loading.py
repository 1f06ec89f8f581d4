"""Tasks from datasets as people have them."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from ...errors import TaskError
from ..task import check_task_name
from ..task_set import TaskSet
from .formatting import formatted
from .limits import checked_limits, first_rows_of
from .reading import FILES, read_source
from .source import REMEDY, DatasetSource


def load_tasks(
    datasets: "Mapping[str, Any] | Iterable[Any]",
    max_rows: Mapping[str, int] | None = None,
) -> TaskSet:
    """Load tasks from the Hub, folders and files.

    Args:
        datasets (`dict[str, str]`, `dict[str, dict]` or list of them):
            A path, or the arguments of a [`DatasetSource`], for each task by name. In a list, as in
            `trl.DatasetMixtureConfig`, tasks are named by the last part of their path.
        max_rows (`dict[str, int]`, *optional*):
            Maximum number of rows of each task by split; of `"validation"` also where they are held out.

    Raises:
        `ConfigurationError`: for `max_rows` that are no positive integers by split.
        `TaskError`: for datasets that cannot be found or read, lack a split or a column, and what
            [`TaskSet.from_datasets`] refuses; the message names the dataset.

    Example:

    ```python
    >>> columns = {"question": "prompt", "answer": "completion"}
    >>> gsm8k = {"path": "openai/gsm8k", "name": "main", "columns": columns}
    >>> load_tasks({"gsm8k": gsm8k, "mine": "data/mine.csv"})  # doctest: +SKIP
    ```
    """
    named = datasets if isinstance(datasets, Mapping) else _named(datasets)
    if not named:
        raise TaskError("Expected at least one dataset, found none.", **REMEDY)
    for task in named:
        check_task_name(task)
    sources = {task: DatasetSource.of(task, given) for task, given in named.items()}
    limits = checked_limits(max_rows)
    splits = {task: _splits(task, source) for task, source in sources.items()}
    _take_fractions(sources, splits)
    weights = {task: source.weight for task, source in sources.items()}
    cut = {task: first_rows_of(own, limits) for task, own in splits.items()}
    tasks = TaskSet.from_datasets(cut, sampling_weights=weights)
    return _with_held_out(tasks, sources, limits.get("validation"))


def _named(datasets: Iterable[Any]) -> dict[str, Any]:
    """Datasets of a list by the last part of their paths, with the configuration where several have the same."""
    given = list(datasets)
    paths = [own.get("path") if isinstance(own, Mapping) else getattr(own, "path", own) for own in given]
    if not all(isinstance(path, (str, Path)) for path in paths):
        raise TaskError(f"Expected each dataset with a path, found {given!s:.120}.", **REMEDY)
    names = [Path(path).stem if Path(path).suffix in FILES else Path(path).name for path in paths]
    counts = Counter(names)
    for number, own in enumerate(given):
        config = own.get("name") if isinstance(own, Mapping) else getattr(own, "name", None)
        if counts[names[number]] > 1 and isinstance(config, str):
            names[number] = f"{names[number]}-{config}"
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise TaskError(f"Two datasets would be named {repeated[0]!r}. Map a name to each.", **REMEDY)
    return dict(zip(names, given))


def _splits(task: str, source: DatasetSource) -> dict[str, Dataset]:
    """The rows by split, in the columns that tasks have."""
    rows = read_source(task, source)
    made = {split: formatted(task, split, own, source.columns, source.templates) for split, own in rows.items()}
    if source.max_rows is not None:
        made["train"] = made["train"].select(range(min(source.max_rows, len(made["train"]))))
    return made


def _take_fractions(sources: Mapping[str, DatasetSource], splits: dict[str, dict[str, Dataset]]) -> None:
    """Keep the first rows of each dataset such that their numbers are as the fractions, as trl does."""
    fractions = {task: source.fraction for task, source in sources.items() if source.fraction is not None}
    if not fractions:
        return
    lacking = sorted(set(sources) - set(fractions))
    if lacking:
        raise TaskError(f"fraction is a share of all datasets, found none of {lacking}. Set it for all or for none.")
    whole = sum(fractions.values())
    total = min(len(splits[task]["train"]) * whole / own for task, own in fractions.items())
    for task, own in fractions.items():
        splits[task]["train"] = splits[task]["train"].select(range(max(round(own / whole * total), 1)))


def _with_held_out(tasks: TaskSet, sources: Mapping[str, DatasetSource], limit: int | None) -> TaskSet:
    """The tasks, with the share or number of rows held out that their sources ask for, at most `limit`."""
    for task, source in sources.items():
        wanted = source.validation
        if isinstance(wanted, str) or wanted is None:
            continue
        rows = len(tasks[task].splits["train"])
        count = wanted if isinstance(wanted, int) else max(round(wanted * rows), 1)
        if count >= rows:
            raise TaskError(
                f"Dataset {task!r}: expected fewer validation rows than the {rows} that there are, found {count}. "
                "Lower validation."
            )
        tasks = tasks.holding_out(task, count if limit is None else min(count, limit))
    return tasks
