"""Scores of the answers in a batch, for any model: language models, encoder-decoders and classifiers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ScoringError
from ..tasks import IGNORE_INDEX, AnswerScores, LabelSpace, restrict_to_labels, score_answers
from .answer_head import AnswerHead
from .inputs import is_encoder_decoder, prepare_inputs
from .kinds import check_kind
from .virtual_tokens import without_virtual_tokens
from .wrappers import unwrapped


class AnswerScorer:
    """Scores answers with the head of a language model at the answer tokens only.

    Works with and without gradients, under autocast, and with the adapter that is active (or disabled) at the call.

    Args:
        model (`nn.Module`): a model, or a `PeftModel`. Distributed and compiled wrappers are taken off.
        label_space (`LabelSpace`, *optional*): label sets of classification tasks.
        with_entropy (`bool`, *optional*, defaults to `False`): also give the entropy of the other answers.

    Raises:
        `ConfigurationError`: for a model of another kind, whose labels are not those that are scored.

    Example:

    ```python
    >>> scores = AnswerScorer(model)(inputs, labels)  # doctest: +SKIP
    >>> scores.loss, scores.exact_match  # one of each per row  # doctest: +SKIP
    ```
    """

    def __init__(self, model: nn.Module, label_space: LabelSpace | None = None, with_entropy: bool = False):
        check_kind(model)
        self.model = unwrapped(model)
        self.label_space = label_space
        # Whether position t predicts label t + 1.
        self.shift = not is_encoder_decoder(self.model)
        self._with_entropy = with_entropy
        self._head = AnswerHead(self.model, with_entropy)

    def prepare(self, inputs: Mapping[str, Any], labels: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
        """Inputs and labels as they are scored, see [`prepare_inputs`]. A call does this itself."""
        return prepare_inputs(self.model, inputs, labels)

    def __call__(
        self, inputs: Mapping[str, Any], labels: torch.Tensor, tasks: Sequence[str] | None = None
    ) -> AnswerScores:
        """Scores of a batch.

        Args:
            inputs (`dict`): the model's inputs, without labels, on its device.
            labels (`torch.Tensor` of shape `(B, T)` or `(B,)`): -100 where a token does not count.
            tasks (`Sequence[str]`, *optional*): task of each row; needed where label sets differ.

        Raises:
            `ScoringError`:
                For a row without an answer token, for inputs that [`prepare_inputs`] refuses, and without `tasks` where
                label sets differ.
        """
        inputs, labels = self.prepare(inputs, labels)
        check_answers(labels, self.shift)
        if labels.dim() == 2 and self._head.usable:
            return self._head(inputs, labels, self.shift)
        return score_answers(self.logits(inputs, labels, tasks), labels, self.shift, self._with_entropy)

    def logits(
        self, inputs: Mapping[str, Any], labels: torch.Tensor, tasks: Sequence[str] | None = None
    ) -> torch.Tensor:
        """All logits at the labels' positions, `(B, T, V)`, or `(B, num_labels)` restricted to the tasks' labels.

        Arguments as for a call, after [`prepare`].
        """
        logits = self.model(**inputs).logits
        logits = without_virtual_tokens(self.model, logits, labels)
        return restrict_to_labels(logits, self._label_mask(tasks)) if logits.dim() == 2 else logits

    def _label_mask(self, tasks: Sequence[str] | None) -> torch.Tensor | None:
        if self.label_space is None:
            return None
        if tasks is None:
            raise ScoringError("Expected the task of each row, whose label set its answer is from; found none.")
        return self.label_space.mask(tasks)


def rows_without_answer(labels: torch.Tensor, shift: bool) -> list[int]:
    """Numbers of the rows of labels `(B, T)` or `(B,)` in which no predicted token counts."""
    tokens = labels[:, 1:] if labels.dim() == 2 and shift else labels.reshape(len(labels), -1)
    return (tokens == IGNORE_INDEX).all(dim=1).nonzero().flatten().tolist()


def check_answers(labels: torch.Tensor, shift: bool) -> None:
    """Raise `ScoringError` for a row without an answer token, which has no loss and no right answer."""
    rows = rows_without_answer(labels, shift)
    if rows:
        raise ScoringError(
            f"Expected an answer token in every row, found none in row {rows[0]} of the batch: its labels are all -100 "
            "(the first token's does not count, as no token predicts it). Drop such rows, or raise max_length where "
            "truncation removed the answer."
        )
