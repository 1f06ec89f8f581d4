"""Streaming datasets among the tasks: a table of the first rows of each, and training rows without an end."""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, IterableDataset, interleave_datasets
from transformers import TrainingArguments

from ..._values import without_none
from ...errors import ConfigurationError, TaskError
from ...logging import get_logger
from ...tasks import TASK, TaskSet
from ...tasks.hold_out import num_held_out
from ...tasks.rows import content_hash
from ...tasks.stream_rows import first_rows
from ...tasks.task import named_splits
from .datasets import check_not_splits

logger = get_logger(__name__)


@dataclass(frozen=True)
class ReadStreams:
    """What a trainer is given, with a table of its first rows in place of every stream.

    Args:
        train (`Any`): training rows by task.
        evaluation (`Any`): evaluation rows by task.
        streams (`dict[str, IterableDataset]`): what to train on, of the tasks whose training rows are streamed.
    """

    train: Any
    evaluation: Any
    streams: Mapping[str, IterableDataset]


def read_streams(
    train: Any, evaluation: Any, args: TrainingArguments, num_rows: int, fraction: float | None = None
) -> ReadStreams:
    """Read the first rows of every stream.

    Of a stream without evaluation rows the first ones are held out, as many as of a table of `num_rows` rows, and not
    trained on.

    Args:
        train (`Any`): training rows by task, as tables, streams or splits of them.
        evaluation (`Any`): evaluation rows by task.
        args (`TrainingArguments`): the trainer's arguments.
        num_rows (`int`): how many rows of each stream to read.
        fraction (`float`, *optional*): share of the rows to hold out; nothing is held out by default.

    Raises:
        `ConfigurationError`: for streams of training rows without `max_steps`.
        `TaskError`: for a stream that is too short to hold rows out, and for the splits of one dataset.
    """
    check_not_splits(train)
    if isinstance(train, TaskSet) or not isinstance(train, Mapping):
        return ReadStreams(train, evaluation, {})
    splits = {name: named_splits(source) for name, source in train.items()}
    streams = {name: own["train"] for name, own in splits.items() if isinstance(own.get("train"), IterableDataset)}
    if streams and args.max_steps <= 0:
        raise ConfigurationError(
            f"Streams have no length, so a training needs the number of its steps: expected max_steps for the "
            f"streaming datasets {list(streams)}, found {args.max_steps}. Set max_steps, or load them with "
            "streaming=False."
        )
    if streams and (args.task_sampling == "temperature" or args.sample_with_replacement):
        raise ConfigurationError(
            f"The sizes of streams are unknown, and their rows are read once: expected task_sampling='proportional' or "
            f"'uniform' and no sample_with_replacement for the streaming datasets {list(streams)}. Set "
            "sampling_weights instead, or load them with streaming=False."
        )
    tables = {
        name: {split: as_table(name, rows, num_rows) for split, rows in own.items()} for name, own in splits.items()
    }
    for name, stream in streams.items():
        if fraction is not None and "validation" not in tables[name] and name not in (evaluation or {}):
            tables[name], streams[name] = _held_out(name, tables[name], stream, fraction, args)
    if isinstance(evaluation, Mapping):
        evaluation = {name: as_table(name, rows, num_rows) for name, rows in evaluation.items()}
    return ReadStreams(tables, evaluation, streams)


def as_table(name: str, rows: Any, num_rows: int) -> Any:
    """The first rows of a stream; anything else as it is."""
    return first_rows(name, rows, num_rows) if isinstance(rows, IterableDataset) else rows


def _held_out(
    name: str, splits: dict[str, Dataset], stream: IterableDataset, fraction: float, args: TrainingArguments
) -> tuple[dict[str, Dataset], IterableDataset]:
    rows = splits["train"]
    count = num_held_out(len(rows), fraction)
    if count == 0:
        raise TaskError(
            f"Task {name!r}: expected a stream of at least 2 rows, to hold one out for evaluation, found {len(rows)}."
        )
    logger.warning("No evaluation rows were given: the first %d rows of the stream %s are held out.", count, name)
    own = {"train": rows.select(range(count, len(rows))), "validation": rows.select(range(count))}
    stream = stream.skip(count)
    if args.dataloader_num_workers > 1:
        # Each worker reads a part of the stream and skips a part of the rows there, which may be other ones.
        held_out = {content_hash(without_none(row)) for row in own["validation"]}
        stream = stream.filter(_is_not_among, fn_kwargs={"held_out": held_out})
    return {**splits, **own}, stream


def _is_not_among(row: Mapping[str, Any], held_out: Collection[str]) -> bool:
    return content_hash(without_none(row)) not in held_out


def balanced(tasks: TaskSet, streams: Mapping[str, IterableDataset]) -> TaskSet:
    """The tasks with weights by which each is drawn equally often, as nobody knows how many rows a stream has.

    Weights that the tasks have already multiply them.

    Args:
        tasks (`TaskSet`): the tasks, made of the first rows of streams.
        streams (`dict[str, IterableDataset]`): those that are streamed; without any the tasks stay as they are.
    """
    if not streams:
        return tasks
    counts = {name: len(rows) for name, rows in tasks.split("train").items()}
    return TaskSet(
        [replace(task, is_streamed=name in streams) for name, task in tasks.items()],
        {name: tasks.sampling_weights[name] * min(counts.values()) / count for name, count in counts.items()},
    )


def interleaved(
    streams: Mapping[str, IterableDataset], tables: Dataset, weights: Mapping[str, float], args: TrainingArguments
) -> IterableDataset:
    """Rows of several tasks, each drawn at random by its task's weight and in its task's own order, without an end.

    A task that has ended begins again. The tables stand for the streams' sizes: a task is drawn in proportion to its
    weight times its number of rows there, so that a row of the table counts as predictions count it. The same seed
    gives the same rows, so a training that is resumed goes on as it would have.

    Args:
        streams (`dict[str, IterableDataset]`): tokens and `task`, of the tasks that are streamed.
        tables (`Dataset`): tokens and `task`; all rows of the other tasks, which are shuffled once.
        weights (`dict[str, float]`): relative weight of one row of each task.
        args (`TrainingArguments`): of the training; its processes read the rows themselves from now on.
    """
    # Accelerate would have one process read for all and cannot send texts, such as the name of a task.
    args.accelerator_config = copy.copy(args.accelerator_config)
    args.accelerator_config.dispatch_batches = False
    seed = args.seed if args.data_seed is None else args.data_seed
    places: dict[str, list[int]] = {}
    for place, task in enumerate(tables[TASK]):
        places.setdefault(task, []).append(place)
    # Streams do not know the types of their columns, which are those of the rows that were read.
    sources = [
        streams[task].map(dict, features=tables.features)
        if task in streams
        else tables.select(own).shuffle(seed=seed).to_iterable_dataset()
        for task, own in places.items()
    ]
    shares = [weights[task] * len(own) for task, own in places.items()]
    endless = [source.repeat(None) for source in sources]
    if len(endless) == 1:
        return endless[0]
    return interleave_datasets(endless, probabilities=[share / sum(shares) for share in shares], seed=seed)
