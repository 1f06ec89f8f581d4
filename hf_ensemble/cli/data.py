"""From flags to tasks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, TaskError
from ..tasks import TaskSet, load_task_folder, load_tasks
from ..tasks.sources.reading import files_by_split
from .arguments import DataArguments, check_share

_MIXTURE_KEYS = ("datasets", "streaming", "test_split_size")


def tasks_of(arguments: DataArguments) -> TaskSet:
    """The tasks that the flags name.

    Raises:
        `ConfigurationError`: for flags that name no data, or name them twice.
        `TaskError`: for data that cannot be found or read.
    """
    limits = {"train": arguments.max_train_rows, "validation": arguments.max_validation_rows}
    limits = {split: limit for split, limit in limits.items() if limit is not None}
    ways = {name: getattr(arguments, name) for name in ("data", "datasets", "dataset_mixture")}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        raise ConfigurationError(
            f"Expected one of --data, --datasets and --dataset_mixture, found {given or 'none'}. Name the data in one "
            "place."
        )
    share = arguments.test_split_size
    if given == ["data"] and len(arguments.data) == 1 and _is_folder_of_tasks(arguments.data[0]):
        tasks = load_task_folder(arguments.data[0], max_rows=limits, names=arguments.tasks)
        return _with_share_held_out(tasks, share, limits.get("validation"))
    if given == ["data"]:
        sources = _words(arguments.data)
    elif given == ["datasets"]:
        sources = _parsed("datasets", arguments.datasets)
    else:
        mixture = _mixture(arguments.dataset_mixture)
        sources = mixture["datasets"]
        if share is None:
            share = mixture.get("test_split_size")
            check_share("test_split_size of dataset_mixture", share)
    tasks = load_tasks(sources, limits)
    if arguments.tasks is not None:
        unknown = sorted(set(arguments.tasks) - set(tasks))
        if unknown:
            raise TaskError(f"No dataset named {unknown}; the datasets are {list(tasks)}. Correct --tasks.")
        tasks = tasks.subset(arguments.tasks)
    return _with_share_held_out(tasks, share, limits.get("validation"))


def _is_folder_of_tasks(word: str) -> bool:
    """Whether a word is a folder with a folder or file for each dataset, rather than one dataset's."""
    folder = Path(word)
    if not folder.is_dir():
        return False
    return "train" in files_by_split(folder) or not any(folder.glob("*.arrow"))


def _words(words: Sequence[str]) -> Any:
    """`NAME=PATH` and `PATH` as sources."""
    named = [word.split("=", 1) if "=" in word else [None, word] for word in words]
    if all(name is None for name, _ in named):
        return [path for _, path in named]
    lacking = [path for name, path in named if name is None]
    if lacking:
        raise ConfigurationError(f"Expected NAME=PATH for every dataset or for none, found {lacking}. Name these too.")
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"Expected different names in --data, found {names}. Rename one.")
    return dict(named)


def _parsed(flag: str, texts: Sequence[str]) -> Any:
    """Sources from JSON: a mapping by name, or a list of mappings with a path."""
    found = [_json(flag, text) for text in texts]
    is_mapping = isinstance(found[0], dict) and not isinstance(found[0].get("path"), str)
    return found[0] if len(found) == 1 and (is_mapping or isinstance(found[0], list)) else found


def _json(flag: str, text: str) -> Any:
    try:
        return json.loads(text) if text.lstrip().startswith(("{", "[", '"')) else text
    except ValueError as error:
        raise ConfigurationError(f"{flag} has to be JSON, found {text!r:.80}: {error}. Correct it.") from error


def _mixture(text: str) -> dict[str, Any]:
    """A mixture of trl."""
    mixture = _json("dataset_mixture", text)
    if not isinstance(mixture, dict) or not isinstance(mixture.get("datasets"), (list, dict)):
        raise ConfigurationError(
            f"dataset_mixture has to be a mapping with datasets, found {text!r:.80}. Write it in a --config file."
        )
    unknown = sorted(set(mixture) - set(_MIXTURE_KEYS))
    if unknown:
        raise ConfigurationError(
            f"dataset_mixture has unknown keys {unknown}; known are {', '.join(_MIXTURE_KEYS)}. Correct them."
        )
    if mixture.get("streaming"):
        raise ConfigurationError("Streaming is not for the command line: set max_rows of the datasets instead.")
    return mixture


def _with_share_held_out(tasks: TaskSet, share: float | None, limit: int | None) -> TaskSet:
    """The tasks, with this share of the rows of each held out where it has no evaluation rows, at most `limit`."""
    for name, task in tasks.items() if share is not None else ():
        rows = len(task.splits["train"])
        if "validation" in task.splits:
            continue
        if rows < 2:
            raise TaskError(f"Dataset {name!r}: expected at least 2 rows to hold one out, found {rows}. Add rows.")
        count = min(max(round(share * rows), 1), rows - 1)
        tasks = tasks.holding_out(name, count if limit is None else min(count, limit))
    return tasks
