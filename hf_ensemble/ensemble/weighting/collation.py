"""Batches of plain rows, for data that comes without a collator."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from ...tasks import IGNORE_INDEX

Collator = Callable[[list[Mapping[str, Any]]], Mapping[str, Any]]


def default_collator(config: PreTrainedConfig) -> Collator:
    """A collator that turns numbers and lists of numbers into tensors, padded on the right; it drops other columns."""
    pad = getattr(config, "pad_token_id", None) or 0
    fill = {"input_ids": pad, "decoder_input_ids": pad, "labels": IGNORE_INDEX}

    def collate(examples: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        examples = [
            {**row, "attention_mask": row.get("attention_mask", [1] * len(row["input_ids"]))} for row in examples
        ]
        return {
            key: _padded([row[key] for row in examples], fill.get(key, 0))
            for key in examples[0]
            if _is_numeric(examples[0][key])
        }

    return collate


def _padded(values: list[Any], fill: int) -> torch.Tensor:
    tensors = [torch.as_tensor(value) for value in values]
    if not tensors[0].dim():
        return torch.stack(tensors)
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)


def _is_numeric(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(v, (int, float)) for v in value)
    return isinstance(value, (int, float, np.ndarray, torch.Tensor)) and not isinstance(value, bool)
