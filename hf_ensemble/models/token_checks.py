"""Whether tokens and labels are the model's own."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from torch import nn

from ..errors import TaskError
from ..tasks import EXAMPLE_ID, IGNORE_INDEX, TASK
from .inputs import is_encoder_decoder


def check_token_rows(model: nn.Module, rows: Dataset) -> None:
    """Check rows of tokens against the model that they are for, before anything is run on them.

    Args:
        model (`nn.Module`): tells the size of the vocabulary and the number of labels.
        rows (`Dataset`): `input_ids` and `labels`, with `task` and `example_id`.

    Raises:
        `TaskError`: for the first row with a token outside of the vocabulary, a label outside of the model's outputs,
            labels that are not one for each token, or no label that a token predicts.
    """
    config = getattr(model, "config", None)
    if config is None or not {"input_ids", "labels"} <= set(rows.column_names):
        return
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    shift = not is_encoder_decoder(model)
    number = 0
    for batch in rows.with_format("arrow").select_columns(["input_ids", "labels"]).iter(batch_size=1000):
        ids, labels = (batch[column].combine_chunks() for column in ("input_ids", "labels"))
        of_tokens = pa.types.is_list(labels.type) or pa.types.is_large_list(labels.type)
        outputs = vocabulary if of_tokens else getattr(config, "num_labels", None)
        faulty = [_out_of_range(ids, vocabulary, ()), _out_of_range(labels, outputs, (IGNORE_INDEX,))]
        if of_tokens:
            faulty.append(_without_answer(labels, shift))
            if shift:
                lengths = pc.not_equal(pc.list_value_length(ids), pc.list_value_length(labels))
                faulty.append(lengths.to_numpy(zero_copy_only=False))
        found = np.flatnonzero(np.any(faulty, axis=0))
        if len(found):
            row = rows.with_format(None)[number + int(found[0])]
            raise TaskError(
                f"Task {row.get(TASK)!r}, example {row.get(EXAMPLE_ID)!r}: {_fault(row, vocabulary, outputs, shift)}"
            )
        number += len(ids)


def _out_of_range(values: pa.Array, size: int | None, allowed: tuple[int, ...]) -> np.ndarray:
    """Which rows hold a value that is not in `range(size)`, bool `(n,)`."""
    wrong = np.zeros(len(values), dtype=bool)
    if size is None:
        return wrong
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        own, rows = pc.list_flatten(values), pc.list_parent_indices(values).to_numpy(zero_copy_only=False)
    else:
        own, rows = values, np.arange(len(values))
    flat = own.to_numpy(zero_copy_only=False)
    outside = ((flat < 0) | (flat >= size)) & ~np.isin(flat, allowed)
    wrong[rows[outside]] = True
    return wrong


def _without_answer(labels: pa.Array, shift: bool) -> np.ndarray:
    """Which rows have no label that counts, bool `(n,)`; the first token's does not, as no token predicts it."""
    flat = pc.list_flatten(labels).to_numpy(zero_copy_only=False)
    rows = pc.list_parent_indices(labels).to_numpy(zero_copy_only=False)
    counts = flat != IGNORE_INDEX
    if shift:
        counts &= np.diff(rows, prepend=-1) == 0
    return np.bincount(rows[counts], minlength=len(labels)) == 0


def _fault(row: Mapping[str, Any], vocabulary: int | None, outputs: int | None, shift: bool) -> str:
    ids, labels = row["input_ids"], row["labels"]
    outside = [token for token in ids if vocabulary is not None and not 0 <= token < vocabulary]
    if outside:
        return (
            f"expected token ids from 0 to {vocabulary - 1}, the model's vocabulary, found {outside[0]}. Use the "
            "model's own tokenizer, or resize its embeddings."
        )
    own = labels if isinstance(labels, list) else [labels]
    outside = [label for label in own if outputs is not None and label != IGNORE_INDEX and not 0 <= label < outputs]
    if outside:
        return (
            f"expected labels from 0 to {outputs - 1}, or {IGNORE_INDEX} where none counts, found {outside[0]}. "
            "Correct the row or drop it."
        )
    if shift and len(labels) != len(ids):
        return f"expected {len(ids)} labels, one for each token, found {len(labels)}. Correct the row or drop it."
    return (
        f"expected an answer, found no label other than {IGNORE_INDEX} in {len(labels)} tokens (the first token's "
        "does not count, as no token predicts it). Drop the row, or raise max_length where truncation removed the "
        "answer."
    )
