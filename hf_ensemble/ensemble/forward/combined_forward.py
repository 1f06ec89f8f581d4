"""The combined logits and scores of a batch, whatever the combination."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ...errors import EnsembleError
from ...models.answer_head import AnswerHead, head_width, tokens_at_once
from ...models.inputs import is_encoder_decoder
from ...models.sharding import is_sharded
from ...tasks import AnswerScores, restrict_to_labels, score_answers
from .answers import MemberAnswers
from .cache import EnsembleCache, cache_argument, cache_maker
from .inference import MemberForward
from .routing import prompt_weights
from .scoring import MemberTokens, ensemble_scores, member_tokens
from .summed import keep_stacks, kept_stacks, summed_weights


@dataclass(frozen=True)
class CombinedForward:
    """Runs adapters over a base model and combines what they give.

    Args:
        model (`PeftModel`): holds the adapters.
        names (`Sequence[str]`): adapter names, in the order of the weights' columns.
        combination (`str`): `logits`, `log_probs`, `probs` or `weights`.
        fused (`bool`): whether to run all adapters at once.
    """

    model: PeftModel
    names: Sequence[str]
    combination: str
    fused: bool

    @property
    def base(self) -> nn.Module:
        return self.model.get_base_model()

    @property
    def shift(self) -> bool:
        """Whether position t predicts label t + 1."""
        return not is_encoder_decoder(self.model)

    def members(self, combination: str | None = None) -> MemberForward:
        """Runs the adapters on a batch; to be used in a `with` statement."""
        fused = self.fused and not self.model.training  # Dropout and checkpointing are the layers' own.
        return MemberForward(self.model, self.base.forward, self.names, combination or self.combination, fused)

    def logits(
        self, weights: torch.Tensor, inputs: Mapping[str, Any], cache: Any = None, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Any]:
        """Combined logits `(B, T, V)` or `(B, num_labels)`, and the cache for the next call.

        Without gradients no more than these logits exist: where those of all members would be large, they are combined
        a few tokens at a time, unless the base is sharded: its processes have to run it as often, whatever their rows.

        Args:
            weights (`torch.Tensor` of shape `(B, members)`): weight of each adapter for each row.
            inputs (`dict`): the base model's inputs.
            cache (`Cache`, *optional*): cache of the earlier calls.
            mask (`torch.Tensor` of shape `(B, num_labels)`, *optional*): labels that each row may answer with.
        """
        if self.combination == "weights":
            stacks = kept_stacks(cache)
            with summed_weights(self.model, self.names, weights, stacks):
                name = cache_argument(self.base.forward)
                output = self.base.forward(**inputs, **({} if cache is None else {name: cache}))
            cache = getattr(output, name, None)
            keep_stacks(cache, stacks)
            logits = output.logits.float()
        else:
            if cache is not None and not isinstance(cache, EnsembleCache):
                raise EnsembleError(
                    f"Expected past_key_values of an earlier call of the ensemble, found {type(cache).__name__}: each "
                    "adapter keeps its own states. Start with past_key_values=None and use_cache=True."
                )
            if cache is None and inputs.get("use_cache"):
                cache = EnsembleCache(cache_maker(self.base.config))
            with self.members() as run:
                if self._are_too_many(weights, inputs):
                    logits = MemberAnswers(run, self.base).combined(weights, inputs, self.combination, cache)
                else:
                    logits = run(weights, inputs, cache, mask)
        return (restrict_to_labels(logits, mask) if logits.dim() == 2 else logits), cache

    def _are_too_many(self, weights: torch.Tensor, inputs: Mapping[str, Any]) -> bool:
        ids = inputs.get("input_ids" if self.shift else "decoder_input_ids")
        width = head_width(self.base)
        if torch.is_grad_enabled() or ids is None or width is None or inputs.get("logits_to_keep") is not None:
            return False
        # Whether the base is sharded takes a walk over its modules: asked last.
        most = tokens_at_once(int((weights != 0).sum()), width, weights.device)
        return most < ids.shape[1] and not is_sharded(self.base)

    def scores(
        self,
        weights: torch.Tensor,
        inputs: Mapping[str, Any],
        labels: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> AnswerScores:
        """Scores of the answers; arguments as for [`logits`], labels `(B, T)` or `(B,)`."""
        if self.combination != "weights":
            with self.members() as run:
                answers = MemberAnswers(run, self.base)
                return ensemble_scores(answers, weights, inputs, labels, self.shift, self.combination, mask)
        with summed_weights(self.model, self.names, weights):
            head = AnswerHead(self.base)
            if labels.dim() == 2 and head.usable:
                return head(inputs, labels, self.shift)
            logits = self.base.forward(**inputs).logits
            logits = restrict_to_labels(logits, mask) if logits.dim() == 2 else logits
            return score_answers(logits, labels, self.shift)

    def member_tokens(
        self, inputs: Mapping[str, Any], labels: torch.Tensor, mask: torch.Tensor | None = None
    ) -> Iterator[MemberTokens]:
        """Each member's own logits at the answers' tokens, a few tokens at a time."""
        with self.members("logits") as run:
            answers = MemberAnswers(run, self.base)
            yield from member_tokens(answers, len(self.names), inputs, labels, self.shift, mask)

    def prompt_weights(
        self, rows: Sequence[int], inputs: Mapping[str, Any], labels: torch.Tensor | None, temperature: float
    ) -> torch.Tensor:
        """Weights `(len(rows), members)` of some rows by their prompts, see [`prompt_weights`].

        Raises:
            `EnsembleError`: for a model other than a causal language model, and for inputs without `input_ids`.
        """
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if not self.shift or not self.base.can_generate() or ids is None:
            raise EnsembleError(
                "routing='prompt' needs a causal language model and prompts in input_ids. Pass task=, or "
                "routing='default'."
            )
        index = torch.tensor(rows, device=ids.device)
        own = [None if value is None else value[index] for value in (ids, mask, labels)]
        with self.members("logits") as run:
            return prompt_weights(MemberAnswers(run, self.base), len(self.names), *own, temperature=temperature)
