"""Weights for rows of no known task, from how well each adapter predicts the prompt."""

import inspect

import torch

from ...errors import EnsembleError
from ...tasks import IGNORE_INDEX
from .inference import MemberForward

ROUTINGS = ("default", "prompt")


def check_routing(routing: str) -> None:
    if routing not in ROUTINGS:
        raise EnsembleError(f"Unknown routing {routing!r}; known: {', '.join(map(repr, ROUTINGS))}.")


@torch.no_grad()
def prompt_weights(
    run: MemberForward,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    temperature: float = 0.1,
) -> torch.Tensor:
    """softmax(s_k / temperature) with s_k the mean log-probability of the prompt's tokens under adapter k.

    Args:
        run (`MemberForward`): computes the adapters' logits.
        input_ids (`torch.Tensor` of shape `(B, T)`): prompts.
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 on padding.
        labels (`torch.Tensor` of shape `(B, T)`, *optional*): answers, which must not tell the weights: only tokens
            whose label is -100 are scored.
        temperature (`float`): nats per token that make one adapter e times as heavy as another.

    Returns:
        `torch.Tensor` of shape `(B, adapters)`: rows sum to 1; equal weights for a prompt of one token.
    """
    inputs = {"input_ids": input_ids, "use_cache": False}
    scored = torch.ones_like(input_ids[:, 1:], dtype=torch.bool)
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
        scored = (attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] != 0)
        if (
            "position_ids" in inspect.signature(run.forward).parameters
        ):  # counted from the first token, as in `generate`
            inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    if labels is not None:
        scored = scored & (labels[:, 1:] == IGNORE_INDEX)
    scores = []
    with run:
        for _, logits in run.members(inputs):
            log_probs = torch.log_softmax(logits[:, :-1].float(), -1)
            own = log_probs.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
            scores.append((own * scored).sum(1) / scored.sum(1).clamp(min=1))
    return torch.softmax(torch.stack(scores, 1) / temperature, 1)
