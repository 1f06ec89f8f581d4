"""Weights of a row from its prompt's hidden states: multinomial regression behind the frozen base model."""

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ...errors import EnsembleError, EnsembleLoadError
from ...models.inputs import is_encoder_decoder
from .adapter_layers import active_adapter, adapter_layers
from .routing import is_before_the_answer

# Inputs that tell of a row's prompt.
PROMPT_INPUTS = ("input_ids", "attention_mask")
# Adapters that weigh no more together change little, and each costs a forward.
_LIGHT = 0.05
_TENSORS = ("mean", "matrix", "bias", "mixtures")
# Of the base model's middle block and its last one: the last one knows what comes next, or what a text means, and the
# middle one what kind of text it is.
NUM_STATES = 2


@dataclass(frozen=True)
class PromptRouter:
    """softmax((x - mean) matrix + bias) mixtures, with x the mean of the base's hidden states over the prompt.

    The softmax says of which of g kinds a prompt is: those that one adapter answers best, or those of a task.

    Args:
        mean (`torch.Tensor` of shape `(H,)`): what is subtracted from the hidden states.
        matrix (`torch.Tensor` of shape `(H, g)`): a column for each kind.
        bias (`torch.Tensor` of shape `(g,)`): logarithm, up to a constant, of the shares of an average prompt.
        mixtures (`torch.Tensor` of shape `(g, m)`):
            For each kind, shares of the adapters that are no boosting steps.
    """

    mean: torch.Tensor
    matrix: torch.Tensor
    bias: torch.Tensor
    mixtures: torch.Tensor

    def weights(self, states: torch.Tensor) -> torch.Tensor:
        """Weights `(B, m)` from mean hidden states `(B, H)`, without the lightest, see [`without_light`].

        Raises:
            `EnsembleError`: for hidden states of another size.
        """
        states = states.float()
        if states.shape[1] != len(self.mean):
            raise EnsembleError(
                f"Expected hidden states of size {len(self.mean)}, found {states.shape[1]}: the router was fitted on "
                "another base model. Fit it anew with fit_router()."
            )
        mean, matrix, bias, mixtures = (getattr(self, name).to(states.device) for name in _TENSORS)
        return without_light(torch.softmax((states - mean) @ matrix + bias, 1) @ mixtures)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name, in float32 on the CPU."""
        return {name: getattr(self, name).detach().float().cpu().contiguous() for name in _TENSORS}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], num_members: int) -> "PromptRouter":
        """What [`tensors`] gave.

        Raises:
            `EnsembleLoadError`: for tensors that are not of finite numbers, or not of this many adapters.
        """
        found = {name: tuple(own.shape) for name, own in tensors.items()}
        width, kinds = (found.get(name, ())[:1] for name in ("mean", "bias"))
        expected = dict(zip(_TENSORS, (width, (*width, *kinds), kinds, (*kinds, num_members))))
        is_whole = found == expected and 0 not in (*width, *kinds) and len(width) == len(kinds) == 1
        if not is_whole or not all(own.is_floating_point() and own.isfinite().all() for own in tensors.values()):
            raise EnsembleLoadError(
                "The ensemble's router is damaged: expected finite numbers, mean (H), matrix (H, g), bias (g) and "
                f"mixtures (g, {num_members}), found {found}."
            )
        mixtures = tensors["mixtures"]
        if (mixtures < 0).any() or ((mixtures.sum(1) - 1).abs() > 1e-3).any():
            raise EnsembleLoadError(
                "The ensemble's router is damaged: expected shares of the adapters, with a sum of 1, for each kind."
            )
        return cls(**{name: tensors[name].float() for name in _TENSORS})


def without_light(shares: torch.Tensor) -> torch.Tensor:
    """Shares `(B, m)` without the lightest, as many as have at most a twentieth together; the rest sums to 1."""
    ascending, order = shares.sort(1)
    is_light = torch.zeros_like(shares, dtype=torch.bool).scatter(1, order, ascending.cumsum(1) <= _LIGHT)
    shares = shares.masked_fill(is_light, 0.0)
    return shares / shares.sum(1, keepdim=True)


def check_router(router: PromptRouter | None, num_members: int) -> None:
    """Raise `EnsembleError` for anything but a router of this many adapters, or `None`."""
    if router is None:
        return
    if not isinstance(router, PromptRouter):
        raise EnsembleError(
            f"Expected router to be a PromptRouter, found {router!r:.60}. A fit has it as its attribute router."
        )
    if router.mixtures.shape[1] != num_members:
        raise EnsembleError(
            f"Expected a router for {num_members} adapters, found one for {router.mixtures.shape[1]}. Fit it anew with "
            "fit_router()."
        )


def known_router(router: PromptRouter | None, num_members: int) -> PromptRouter:
    """The router; raises `EnsembleError` where there is none for this many adapters."""
    if router is None:
        raise EnsembleError("routing='hidden_states' needs a router, and the ensemble has none. Call fit_router().")
    check_router(router, num_members)
    return router


@torch.no_grad()
def prompt_states(base: nn.Module, inputs: Mapping[str, Any], labels: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of the base model's hidden states over each prompt's tokens, `(B, H)` in float32.

    Those of its middle block and, after them, of its last one; of the last one alone where the blocks are not those of
    transformers. The base runs once without its adapters and without its head; of an encoder-decoder, the encoder.

    Args:
        base (`PreTrainedModel`): the base model, with or without adapters in it.
        inputs (`dict`):
            `input_ids` of shape `(B, T)`, prompts with their answers where there are labels, and `attention_mask`.
        labels (`torch.Tensor` of shape `(B, T)`, *optional*):
            The first label other than -100 ends a row's prompt: answers must not decide the weights.

    Raises:
        `EnsembleError`: for inputs without `input_ids`.
    """
    input_ids, attention_mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if input_ids is None:
        raise EnsembleError("Routing by hidden states needs prompts in input_ids, found none. Pass task=.")
    encodes = is_encoder_decoder(base)
    body = base.get_encoder() if encodes else base.base_model
    present = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    own = {"input_ids": input_ids, "attention_mask": present.long()}
    accepted = inspect.signature(body.forward).parameters
    if not encodes and base.can_generate():
        # Counted from the first token, as in `generate`.
        positions = (present.long().cumsum(-1) - 1).clamp(min=0)
        own |= {key: value for key, value in (("position_ids", positions), ("use_cache", False)) if key in accepted}
    found: list[torch.Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(active_adapter(adapter_layers(base), None))
        if (middle := _middle_block(body)) is not None:
            stack.enter_context(
                middle.register_forward_hook(lambda block, inputs, states: found.append(_first(states)))
            )
        found.append(body(**own).last_hidden_state)
    prompt = present
    if labels is not None and labels.dim() == 2 and labels.shape == input_ids.shape and not encodes:
        prompt = present & is_before_the_answer(labels)
        # A text without a prompt is known by its first token.
        first = present & (present.long().cumsum(1) == 1)
        prompt = prompt | (first & ~prompt.any(1, keepdim=True))
    shares = prompt.float() / prompt.sum(1, keepdim=True).clamp(min=1)
    # Blocks that shorten texts have no state for each token.
    states = [own.float().to(shares.device) for own in found if own.shape[:2] == shares.shape]
    return torch.cat([torch.einsum("bt,bth->bh", shares, own) for own in states], 1)


def _middle_block(body: nn.Module) -> nn.Module | None:
    """The block that half of the text model's blocks end with; `None` where there are not two of them."""
    blocks = [module for module in body.modules() if isinstance(module, GradientCheckpointingLayer)]
    # Those of what reads pictures come before those of texts.
    blocks = [own for own in blocks if type(own) is type(blocks[-1])]
    return blocks[len(blocks) // 2 - 1] if len(blocks) > 1 else None


def _first(states: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return states if torch.is_tensor(states) else states[0]
