"""An ensemble's scores of answers, and its adapters' logits at them."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ...errors import EnsembleError
from ...models.answer_head import answer_tokens, select_answers, tokens_at_once
from ...models.kinds import ModelKind, kind_of
from ...tasks import IGNORE_INDEX, AnswerScores, restrict_to_labels, token_scores
from .answers import MemberAnswers

# Combinations in which a classifier's outputs are those of one model, and not a distribution over its labels.
_OF_VALUES = ("logits", "weights")
# Losses of classifiers whose label is not one class of each row, by `problem_type`, from logits and labels in float32.
_VALUE_LOSSES = {
    "regression": nn.functional.mse_loss,
    "multi_label_classification": nn.functional.binary_cross_entropy_with_logits,
}


class MemberTokens(NamedTuple):
    """Logits of one adapter at some of a batch's answer tokens.

    Args:
        member (`int`): number of the adapter.
        tokens (`torch.Tensor` of shape `(x,)`): numbers of the tokens among the batch's, row by row.
        targets (`torch.Tensor` of shape `(x,)`): the tokens themselves, or labels.
        logits (`torch.Tensor` of shape `(x, V)`): the adapter's logits.
    """

    member: int
    tokens: torch.Tensor
    targets: torch.Tensor
    logits: torch.Tensor


def ensemble_scores(
    answers: MemberAnswers,
    weights: torch.Tensor,
    inputs: Mapping[str, Any],
    labels: torch.Tensor,
    shift: bool,
    combination: str,
    mask: torch.Tensor | None = None,
) -> AnswerScores:
    """Scores of the combined logits.

    Args:
        answers (`MemberAnswers`): runs the adapters.
        weights (`torch.Tensor` of shape `(B, adapters)`): weight of each adapter for each row.
        inputs (`dict`): the base model's inputs.
        labels (`torch.Tensor` of shape `(B, T)` or `(B,)`): -100 where a token does not count.
        shift (`bool`): whether position t predicts label t + 1.
        combination (`str`): `logits`, `log_probs` or `probs`.
        mask (`torch.Tensor` of shape `(B, num_labels)`, *optional*): labels that each row may answer with.
    """
    index, targets = answer_tokens(labels, shift)
    log_probs = torch.zeros(targets.shape, device=targets.device)
    correct = torch.zeros_like(targets, dtype=torch.bool)
    counts = (targets != IGNORE_INDEX).sum(1)
    if counts.any():
        for piece in answers.pieces(weights, inputs, index, counts, labels.shape[-1]):
            own = targets[piece.rows, piece.tokens].clamp(min=0)
            found, right = token_scores(piece.combined(combination, mask), own)
            log_probs[piece.rows, piece.tokens], correct[piece.rows, piece.tokens] = found, right
    return select_answers(log_probs, correct, targets)


def member_tokens(
    answers: MemberAnswers,
    num_members: int,
    inputs: Mapping[str, Any],
    labels: torch.Tensor,
    shift: bool,
    mask: torch.Tensor | None = None,
) -> Iterator[MemberTokens]:
    """Every adapter's logits at every answer token, piece by piece; arguments as for [`ensemble_scores`]."""
    index, targets = answer_tokens(labels, shift)
    wanted = targets != IGNORE_INDEX
    if not wanted.any():
        return
    numbers = (wanted.flatten().cumsum(0) - 1).view_as(targets)
    weights = torch.ones(len(labels), num_members, device=labels.device)
    for piece in answers.pieces(weights, inputs, index, wanted.sum(1), labels.shape[-1]):
        for member, rows, _, logits in piece.members:
            rows = piece.rows[rows]
            if mask is not None:
                logits = restrict_to_labels(logits, mask[rows].unsqueeze(1))
            own = wanted[rows, piece.tokens]
            yield MemberTokens(
                member, numbers[rows, piece.tokens][own], targets[rows, piece.tokens][own], logits[own].float()
            )


def answer_loss(logits: torch.Tensor, labels: torch.Tensor, shift: bool) -> torch.Tensor:
    """Mean loss over the answer tokens of a batch, from logits `(B, T, V)` or `(B, num_labels)`."""
    index, targets = answer_tokens(labels.to(logits.device), shift)
    rows, columns = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
    logits = logits.unsqueeze(1) if logits.dim() == 2 else logits
    size = tokens_at_once(1, logits.shape[-1], logits.device)
    parts = [
        token_scores(logits[own, index[own, column]], targets[own, column])[0]
        for own, column in zip(rows.split(size), columns.split(size))
    ]
    return -torch.cat(parts).mean()


def values_problem(base: nn.Module, labels: torch.Tensor, has_label_sets: bool) -> str | None:
    """The `problem_type` of a classifier with a number or several labels for each row, as transformers infers it."""
    # Of tasks with label sets, a label for each row is a class, also where there is but one.
    if kind_of(base) is not ModelKind.CLASSIFIER or (has_label_sets and labels.dim() == 1):
        return None
    problem = getattr(base.config, "problem_type", None)
    if problem is None and base.config.num_labels == 1:
        problem = "regression"
    elif problem is None and labels.is_floating_point():
        problem = "multi_label_classification"
    return problem if problem in _VALUE_LOSSES else None


def check_values(problem: str, base: nn.Module, labels: torch.Tensor, combination: str, has_label_sets: bool) -> None:
    """Make sure that a loss of this `problem_type` exists.

    Raises:
        `EnsembleError`: for a combination of distributions, for tasks with label sets, and for labels of another shape.
    """
    if has_label_sets or combination not in _OF_VALUES:
        found = "tasks with label sets" if has_label_sets else f"the combination {combination!r}"
        raise EnsembleError(
            f"Expected one of the combinations {_OF_VALUES} and no label sets for the loss of "
            f"problem_type={problem!r}, found {found}: outputs are then distributions over classes. Call "
            "the ensemble without labels."
        )
    shape = (len(labels), base.config.num_labels)
    if tuple(labels.shape) != shape and not (shape[1] == 1 and labels.dim() == 1):
        raise EnsembleError(
            f"Expected labels of the shape {shape} for problem_type={problem!r}, found {tuple(labels.shape)}."
        )


def values_loss(problem: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean loss over rows and outputs, from logits `(B, num_labels)`, as the base model has it."""
    return _VALUE_LOSSES[problem](logits, labels.to(logits.device).view_as(logits).to(logits.dtype))


def check_one_label(base: nn.Module, labels: torch.Tensor, has_label_sets: bool) -> None:
    """Raise [`EnsembleError`] for a classifier whose label is not one class of each row."""
    problem = values_problem(base, labels, has_label_sets)
    if problem is not None:
        raise EnsembleError(
            f"Expected one class as the label of each row, whose log-probability is its score; found "
            f"problem_type={problem!r}. Call the ensemble itself for logits and the loss."
        )
