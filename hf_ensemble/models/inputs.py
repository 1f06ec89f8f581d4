"""Model inputs in which every row is one example."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ScoringError
from ..tasks import IGNORE_INDEX
from .virtual_tokens import num_virtual_tokens

# Inputs with one entry per token of a row, `(B, T)`.
_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
# What collators call the bounds of documents that share a row.
_BOUNDS = ("seq_lengths", "seq_idx", "cu_seqlens", "cu_seq_lens", "cu_seq_lens_q", "cu_seq_lens_k")


def prepare_inputs(
    model: nn.Module, inputs: Mapping[str, Any], labels: torch.Tensor
) -> tuple[dict[str, Any], torch.Tensor]:
    """Inputs and labels whose outputs depend on each row's own example only, not on its padding.

    Encoder-decoder models get the decoder inputs that their forward would otherwise derive from the labels. Language
    models get their padding on the right, where no position, state or virtual token counts it, or positions that count
    from the first token. No key-value cache is built. Preparing twice is the same as preparing once.

    Args:
        model (`nn.Module`): the model.
        inputs (`dict`): its inputs, without labels.
        labels (`torch.Tensor` of shape `(B, T)` or `(B,)`): -100 where a token does not count.

    Raises:
        `ScoringError`:
            For packed rows, for an encoder-decoder model that cannot derive its decoder inputs, and for left padding
            behind virtual tokens that cannot be moved.
    """
    refuse_packed_rows(inputs)
    inputs = dict(inputs)
    if hasattr(getattr(model, "config", None), "use_cache"):
        # Caches would be built, and gradients kept through them, for nothing.
        inputs["use_cache"] = False
    if labels.dim() != 2:
        return inputs, labels
    if not is_encoder_decoder(model):
        inputs, labels = _right_padded(model, inputs, labels)
        mask = inputs.get("attention_mask")
        if mask is not None and (mask[:, 0] == 0).any():
            # Models number positions from the padding on unless told otherwise.
            inputs["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        return inputs, labels
    if inputs.get("decoder_input_ids") is None and inputs.get("decoder_inputs_embeds") is None:
        inputs["decoder_input_ids"] = _decoder_input_ids(model, labels)
    return _right_padded(model, inputs, None)[0], labels


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether position t of the outputs predicts label t, rather than label t + 1."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def refuse_packed_rows(inputs: Mapping[str, Any]) -> None:
    """Raise `ScoringError` for rows that hold several examples, whose scores and gradients are not one per row."""
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    found = next((name for name in _BOUNDS if inputs.get(name) is not None), None)
    if found is None and mask is not None:
        if not torch.is_tensor(mask) or mask.dim() > 2:
            found = "an attention_mask that is not of shape (batch, tokens)"
        elif mask.dtype != torch.bool and not mask.is_floating_point() and mask.numel() and mask.max() > 1:
            found = "an attention_mask that numbers documents"
    if found is None and torch.is_tensor(positions) and positions.dim() == 2:
        restarts = positions[:, 1:] <= positions[:, :-1]
        if torch.is_tensor(mask) and mask.shape == positions.shape:
            restarts = restarts & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
        if restarts.any():
            found = "position_ids that start again within a row"
    if found is not None:
        raise ScoringError(
            f"Expected one example per row, found {found}, as in packed or padding-free batches. Set packing=False and "
            "padding_free=False, or pass each document as a row of its own."
        )


def row_of(inputs: Mapping[str, Any], labels: torch.Tensor, index: int) -> tuple[dict[str, Any], torch.Tensor]:
    """One example of a batch, as a batch of its own.

    Padding on the right is dropped when all inputs with more than one dimension are per token.

    Raises:
        `ScoringError`: for an input without a row per example.
    """
    size = labels.shape[0]
    if size == 1:
        return dict(inputs), labels
    row = {name: _entry(name, value, index, size) for name, value in inputs.items()}
    labels = labels[index : index + 1]
    mask = row.get("attention_mask")
    if not torch.is_tensor(mask) or not mask.any():
        return row, labels
    length = int(mask[0].nonzero().max()) + 1
    per_token = [value for value in (*row.values(), labels) if torch.is_tensor(value) and value.dim() > 1]
    removable = {name for name, value in row.items() if name in _PER_TOKEN and value.shape == mask.shape}
    others = [name for name, value in row.items() if torch.is_tensor(value) and value.dim() and name not in removable]
    if length == mask.shape[1] or others or any(value.shape != mask.shape for value in per_token):
        return row, labels
    if labels.dim() == 2:
        if (labels[:, length:] != IGNORE_INDEX).any():
            return row, labels
        labels = labels[:, :length]
    return {name: value[:, :length] if name in removable else value for name, value in row.items()}, labels


def _entry(name: str, value: Any, index: int, size: int) -> Any:
    if not torch.is_tensor(value) or value.dim() == 0:
        return value
    # Positions along several axes stand before the batch, `(axes, B, T)`.
    axis = 1 if name == "position_ids" and value.dim() == 3 else 0
    if value.shape[axis] == size:
        return value.narrow(axis, index, 1)
    if name == "position_ids" and value.shape[axis] == 1:
        return value
    raise ScoringError(
        f"Expected one row of {name!r} for each of the {size} examples, found shape {tuple(value.shape)}: the examples "
        "cannot be run one at a time, which parameters without hooks need. Set batch_size=1."
    )


def _decoder_input_ids(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name in ("prepare_decoder_input_ids_from_labels", "_shift_right"):
        make = getattr(base, name, None)
        if callable(make):
            return make(labels)
    raise ScoringError(
        f"Expected decoder_input_ids in the batch, as {type(base).__name__} cannot derive them from labels; found "
        "none. Have the data collator add them."
    )


def _right_padded(
    model: nn.Module, inputs: dict[str, Any], labels: torch.Tensor | None
) -> tuple[dict[str, Any], torch.Tensor | None]:
    """Labels move along where they have one entry per token of the inputs; a decoder's inputs stay."""
    mask = inputs.get("attention_mask")
    if mask is None or (mask[:, 0] != 0).all():
        return inputs, labels
    first = (mask != 0).int().argmax(dim=1, keepdim=True)
    others = [
        name
        for name, value in ({"labels": labels} | inputs).items()
        if torch.is_tensor(value) and value.dim() > 1 and not name.startswith("decoder_")
        if value.shape != mask.shape or name not in (*_PER_TOKEN, "labels")
    ]
    if others:
        if num_virtual_tokens(model):
            raise ScoringError(
                "Expected padding on the right, as PEFT ignores positions behind virtual tokens; found it on the left, "
                f"with {others[0]!r} that cannot be moved. Set padding_side='right'."
            )
        # No token before a row's first one predicts it.
        if labels is not None and labels.shape == mask.shape:
            labels = labels.scatter(1, first, IGNORE_INDEX)
        return inputs, labels
    order = (torch.arange(mask.shape[1], device=mask.device) + first) % mask.shape[1]
    moved = {name: value.gather(1, order) if name in _PER_TOKEN else value for name, value in inputs.items()}
    return moved, labels.gather(1, order) if labels is not None else None
