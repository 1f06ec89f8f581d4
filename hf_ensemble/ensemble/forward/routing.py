"""Weights for rows of no known task, from how well each adapter predicts the prompt."""

import torch

from ..._settings import check_number, check_one_of
from ...errors import EnsembleError
from ...tasks import IGNORE_INDEX, token_scores
from .answers import MemberAnswers
from .scoring import member_tokens

ROUTINGS = ("default", "prompt", "hidden_states")
DEFAULT_TEMPERATURE = 0.1


def check_routing(routing: str | None) -> None:
    """Raise [`EnsembleError`] for an unknown routing; `None` asks for none."""
    if routing is None:
        return
    check_one_of("routing", routing, ROUTINGS, EnsembleError)


def check_temperature(temperature: float) -> None:
    """Raise [`EnsembleError`] for anything but a finite number above 0."""
    check_number("routing_temperature", temperature, 0, above=True, error=EnsembleError)


def is_before_the_answer(labels: torch.Tensor) -> torch.Tensor:
    """Whether tokens stand before the first one with a label, `(B, T)`: those behind it have seen an answer."""
    return (labels != IGNORE_INDEX).long().cumsum(1) == 0


@torch.no_grad()
def prompt_weights(
    answers: MemberAnswers,
    num_members: int,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    temperature: float = DEFAULT_TEMPERATURE,
) -> torch.Tensor:
    """softmax(s_k / temperature) with s_k the mean log-probability of the prompt's tokens under adapter k.

    Args:
        answers (`MemberAnswers`): runs the adapters.
        num_members (`int`): number of adapters.
        input_ids (`torch.Tensor` of shape `(B, T)`): prompts.
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 on padding.
        labels (`torch.Tensor` of shape `(B, T)`, *optional*): answers, which must not affect the weights: only tokens
            before the first one whose label is not -100 are scored.
        temperature (`float`): nats per token that make one adapter e times as heavy as another.

    Returns:
        `torch.Tensor` of shape `(B, adapters)`: rows sum to 1; equal weights for a prompt of one token.
    """
    inputs = {"input_ids": input_ids, "use_cache": False}
    scored = torch.ones_like(input_ids, dtype=torch.bool)
    scored[:, 0] = False
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
        scored[:, 1:] = (attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] != 0)
        if answers.accepts("position_ids"):
            # Counted from the first token, as in `generate`.
            inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    if labels is not None:
        scored &= is_before_the_answer(labels)
    rows, _ = scored.nonzero(as_tuple=True)
    sums = torch.zeros(num_members, len(input_ids), device=input_ids.device)
    targets = input_ids.masked_fill(~scored, IGNORE_INDEX)
    for member, tokens, own, logits in member_tokens(answers, num_members, inputs, targets, shift=True):
        sums[member].index_add_(0, rows[tokens], token_scores(logits, own)[0])
    means = sums / scored.sum(1).clamp(min=1)
    return torch.softmax(means.T / temperature, 1)
