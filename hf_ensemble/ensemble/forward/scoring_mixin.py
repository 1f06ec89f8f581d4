"""Scores of answers and the adapters' own logits: the part of [`PeftEnsembleModel`] that evaluation runs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ...models.answer_scorer import check_answers
from ...models.inputs import is_encoder_decoder, prepare_inputs
from ...tasks import AnswerScores
from .combined_forward import CombinedForward
from .inference import MemberForward
from .rows import model_inputs
from .scoring import MemberTokens, check_one_label
from .task_weights import Tasks, label_mask


class ScoringMixin:
    """Scoring with [`PeftEnsembleModel`]."""

    def prepare(self, inputs: Mapping[str, Any], labels: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
        """Inputs and labels as [`score`] scores them, see [`prepare_inputs`]. It does this itself."""
        return prepare_inputs(self.model.get_base_model(), inputs, labels)

    @torch.no_grad()
    def score(
        self, labels: torch.Tensor, task: Tasks = None, routing: str | None = None, **inputs: Any
    ) -> AnswerScores:
        """Scores of each row's answer, without gradients.

        Logits are made at the answers' tokens only, a few tokens of all members at a time, and the base model runs on
        no more rows at once than the batch has: memory does not grow with the number of members. The members' scores
        alone are [`AnswerScorer`]'s.

        Args:
            labels (`torch.Tensor` of shape `(B, T)` or `(B,)`): -100 where a token does not count.
            task (`str` or `Sequence[str]`, *optional*):
                One task for all rows, or one per row. Rows of no known task are refused unless there is a `routing`; an
                ensemble without tasks takes none.
            routing (`str`, *optional*): overrides the ensemble's own.
            inputs: inputs of the base model.

        Raises:
            `ScoringError`: for a row without an answer token, and for packed rows.
            `EnsembleError`: for adapters that were deleted, replaced or merged, and for hidden states or attentions.
        """
        inputs, labels = self.prepare(model_inputs(inputs), labels)
        self._check_one_label(labels)
        check_answers(labels, not self._is_encoder_decoder)
        weights = self._routed_weights(task, routing, inputs, labels if labels.dim() == 2 else None)
        return self._combined_forward().scores(weights, inputs, labels, self._label_mask(task, len(weights)))

    @torch.no_grad()
    def member_answers(self, labels: torch.Tensor, task: Tasks = None, **inputs: Any) -> Iterator[MemberTokens]:
        """Each member's own logits at the answers' tokens, a few tokens at a time; arguments as for [`score`]."""
        self.check_adapters()
        inputs, labels = self.prepare(model_inputs(inputs), labels)
        self._check_one_label(labels)
        yield from self._combined_forward().member_tokens(inputs, labels, self._label_mask(task, len(labels)))

    def member_forward(self, combination: str | None = None) -> MemberForward:
        """Runs the adapters on a batch; to be used in a `with` statement."""
        return self._combined_forward().members(combination)

    def weighted_logits(self, weights: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Logits `(B, T, V)` or `(B, num_labels)` with weights `(B, members)`, over all labels of a classifier."""
        return self._combined_forward().logits(weights, model_inputs(inputs))[0]

    def _combined_forward(self, names: Sequence[str] | None = None) -> CombinedForward:
        """Of all members by default."""
        names = self.adapter_names if names is None else names
        return CombinedForward(self.model, names, self.combination, self.fused)

    @property
    def _is_encoder_decoder(self) -> bool:
        return is_encoder_decoder(self.model)

    def _check_one_label(self, labels: torch.Tensor) -> None:
        check_one_label(self.model.get_base_model(), labels, self.label_space is not None)

    def _label_mask(self, task: Tasks, batch_size: int) -> torch.Tensor | None:
        return label_mask(task, batch_size, self.label_space, self.device)
