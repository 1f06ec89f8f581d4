"""Rows as the trainer that a callback is part of trains on them."""

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from ..errors import ConfigurationError, TaskError
from ..logging import get_logger
from ..tasks import EXAMPLE_ID, META_COLUMNS, TASK, RowFormat, TaskSet
from ..tasks.answers import IGNORE_INDEX
from ..tasks.sft_rows import SFTRows

logger = get_logger(__name__)

SPLITS = ("train", "validation")
# Rows of the trainer that are compared with the captured ones.
_COMPARED = 1000


def sft_splits(
    tasks: TaskSet,
    processing_class: PreTrainedTokenizerBase,
    args: SFTConfig,
    formatting_func: Callable[[dict[str, Any]], str] | None = None,
    max_length: int | None = None,
    splits: Sequence[str] = SPLITS,
) -> dict[str, Dataset]:
    """The tasks' training and validation rows as `trl.SFTTrainer` makes tokens and labels of them, but never packed.

    Args:
        tasks (`TaskSet`): the tasks.
        processing_class (`PreTrainedTokenizerBase`): the trainer's tokenizer.
        args (`SFTConfig`): the trainer's arguments.
        formatting_func (`Callable`, *optional*): the trainer's.
        max_length (`int`, *optional*): in place of that of the arguments.
        splits (`Sequence[str]`, *optional*, defaults to `("train", "validation")`): which rows.

    Raises:
        `TaskError`: for texts with labels, for rows that no tokens can be made of, and for a task of which no row has
            an answer left.
    """
    if tasks.row_format is RowFormat.CLASSIFICATION:
        raise TaskError(
            "Expected rows that SFTTrainer learns whole, found text and label, of which it learns the text alone. "
            "Drop the column 'label', or make the columns prompt and completion of both."
        )
    args = copy.copy(args)
    args.shuffle_dataset, args.max_length = False, max_length
    return {
        split: concatenate_datasets(
            [_sft_tokens(name, split, rows, processing_class, args, formatting_func) for name, rows in of_tasks.items()]
        )
        for split, of_tasks in ((split, tasks.split(split)) for split in splits)
    }


def _sft_tokens(
    name: str,
    split: str,
    rows: Dataset,
    processing_class: PreTrainedTokenizerBase,
    args: SFTConfig,
    formatting_func: Callable[[dict[str, Any]], str] | None,
) -> Dataset:
    if formatting_func is None:
        SFTRows.of(args, None).check(name, split, rows)
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        tokens = rows if "labels" in rows.column_names else rows.add_column("labels", rows["input_ids"][:])
    else:
        trainer = object.__new__(SFTTrainer)
        # What `_prepare_dataset` reads of a trainer, as its constructor sets it.
        trainer._tokenizer = getattr(processing_class, "tokenizer", processing_class)
        lacks_markers = args.assistant_only_loss and not has_generation_markers(processing_class.chat_template)
        trainer.chat_template = get_training_chat_template(processing_class) if lacks_markers else None
        trainer.completion_only_loss = args.completion_only_loss
        if args.completion_only_loss is None:
            trainer.completion_only_loss = {"prompt", "completion"} <= set(rows.column_names)
        tokens = trainer._prepare_dataset(rows, processing_class, args, False, formatting_func, name)
    if not len(tokens):
        raise TaskError(f"No row of the task {name!r} is left after tokenization: raise max_length.")
    if len(tokens) < len(rows):
        logger.warning(
            "%d of %d rows of %r are left out, as the trainer leaves them out: max_length cuts their answers off.",
            len(rows) - len(tokens),
            len(rows),
            name,
        )
    return tokens.select_columns(["input_ids", "labels", *META_COLUMNS])


def check_against_trained(captured: Dataset, dataloader: Any) -> None:
    """Compare the labels of captured rows with those that a trainer's batches have for the same tokens.

    Args:
        captured (`Dataset`): training rows as tokens, with `task` and `example_id`.
        dataloader (`DataLoader`): the trainer's, over a dataset that can be indexed.

    Raises:
        `ConfigurationError`: for a row whose gradient would be of other tokens than those that are trained on.
    """
    table = getattr(dataloader, "dataset", None)
    if not hasattr(table, "__getitem__") or not hasattr(table, "__len__") or not len(table):
        return
    positions = {hash(tuple(ids)): position for position, ids in enumerate(captured["input_ids"])}
    compared = 0
    for ids, trained in _trained_rows(table, copied(dataloader.collate_fn)):
        position = positions.get(hash(ids))
        if position is None:
            continue
        row, compared = captured[position], compared + 1
        found = _answers(row["labels"])
        if found != trained:
            raise ConfigurationError(
                f"Gradients are captured of what is trained on, but of example {row[EXAMPLE_ID]!r} of task "
                f"{row[TASK]!r} {len(found)} tokens would be captured, {found!r:.60}, and {len(trained)} are trained, "
                f"{trained!r:.60}. Give the callback the rows as the trainer gets them: with the same columns, or "
                "tokenized, with input_ids and labels."
            )
    if not compared:
        logger.warning(
            "None of the captured rows is among those that are trained on, as tokens: gradients are of other texts "
            "than the training's. If this is not meant, give the callback the same rows, and formatting_func where "
            "the trainer has one."
        )


def _trained_rows(table: Any, collate: Callable) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """Tokens of rows spread over a trainer's dataset, and those of them that its batches have as labels."""
    positions = np.unique(np.linspace(0, len(table) - 1, min(_COMPARED, len(table))).round().astype(int))
    with same_random_numbers():
        for position in positions:
            row = table[int(position)]
            if not isinstance(row, Mapping) or "input_ids" not in row:
                return
            if "seq_lengths" in row:
                yield from _documents(row)
                continue
            batch = collate([dict(row)])
            labels, mask = batch.get("labels"), batch.get("attention_mask")
            if labels is None:
                return
            if mask is not None and mask.shape == labels.shape:
                labels = labels[mask.bool()][None]
            yield tuple(torch.as_tensor(row["input_ids"]).tolist()), _answers(labels[0].tolist())


def _documents(row: Mapping[str, Any]) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """The rows that were packed into one."""
    start = 0
    for length in row["seq_lengths"]:
        end = start + int(length)
        yield tuple(row["input_ids"][start:end]), _answers(row["labels"][start:end])
        start = end


def _answers(labels: Any) -> list[int]:
    """The tokens that are learnt, or the one class. The first token cannot be predicted."""
    if isinstance(labels, int):
        return [labels]
    return [label for label in labels[1:] if label != IGNORE_INDEX]


def copied(collate: Callable, shared: Mapping[int, Any] | None = None) -> Callable:
    """A collator of its own, since it may hold a generator of random numbers.

    Args:
        collate (`Callable`): the collator.
        shared (`dict[int, Any]`, *optional*): objects by their `id` that it may hold, and that are not copied.
    """
    try:
        return copy.deepcopy(collate, dict(shared or {}))
    except (TypeError, RuntimeError, copy.Error):
        # It holds what cannot be copied.
        return collate


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Random collators draw inside without a trace."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
