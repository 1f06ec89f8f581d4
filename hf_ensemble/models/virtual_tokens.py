"""Positions that prompt learning adds before the tokens of a row."""

import torch
from torch import nn

from ..errors import ScoringError


def num_virtual_tokens(model: nn.Module) -> int:
    """Number of virtual tokens of the active adapter; 0 for models and adapters without any."""
    config = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
    return getattr(config, "num_virtual_tokens", None) or 0 if getattr(config, "is_prompt_learning", False) else 0


def positions_before(model: nn.Module, found: int, labels: int) -> int:
    """How many of a model's `found` positions come before those of the labels: the virtual tokens.

    Raises:
        `ScoringError`: for positions that are neither the labels' nor virtual.
    """
    if found not in (labels, labels + num_virtual_tokens(model)):
        raise ScoringError(
            f"Expected outputs at the {labels} positions of the labels, found {found}, and which of them answer is "
            "not known. Pass labels for every position of the model's outputs."
        )
    return found - labels


def without_virtual_tokens(model: nn.Module, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits `(B, T, V)` at the positions of labels `(B, T)`; others as they are. See [`positions_before`]."""
    if logits.dim() != 3 or labels.dim() != 2:
        return logits
    return logits[:, positions_before(model, logits.shape[1], labels.shape[1]) :]
