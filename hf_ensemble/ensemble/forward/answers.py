"""The adapters' logits at answer tokens, a few tokens at a time."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...models.answer_head import AnswerHead, BodyRun, tokens_at_once
from ...tasks import restrict_to_labels
from .adapter_layers import active_adapter, adapter_layers
from .cache import EnsembleCache
from .combination import CombinedOutputs
from .inference import MemberForward, MemberOutput
from .rows import AdapterRows, take_rows

# Travels with the inputs of a row to the forward that it is taken from.
_POSITIONS = "answer_positions"


@dataclass(frozen=True)
class AnswerPiece:
    """The adapters' logits for some tokens of some rows.

    Args:
        rows (`torch.Tensor` of shape `(r,)`): row numbers in the batch.
        tokens (`slice`): which of each row's `n` answer tokens.
        length (`int`): number of tokens of a row.
        members (`Iterator[MemberOutput]`): logits `(r_k, tokens, V)` of each adapter, to be read once; their row
            numbers count within `rows`.
    """

    rows: torch.Tensor
    tokens: slice
    length: int
    members: Iterator[MemberOutput]

    def combined(self, combination: str, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Combined outputs `(r, tokens, V)`, restricted to each row's labels where `mask` `(B, V)` is given."""
        own = None if mask is None else mask[self.rows].unsqueeze(1)
        outputs = CombinedOutputs(len(self.rows), combination, own)
        for output in self.members:
            outputs.add(output.rows, output.weights, output.values)
        return restrict_to_labels(outputs.result(), own)


class MemberAnswers:
    """Runs the adapters up to the head, and the head on a few tokens of all adapters at a time.

    Neither the logits of a batch nor those of its answers exist as a whole, for one adapter or for all.

    Args:
        run (`MemberForward`): runs the adapters.
        base (`PreTrainedModel`): the base model.
    """

    def __init__(self, run: MemberForward, base: nn.Module):
        self._run = run
        self._base = base
        self._head = AnswerHead(base)
        self._hidden_size = getattr(base.config.get_text_config(decoder=True), "hidden_size", None)
        inner = {module for body in self._head.bodies for module in body.modules()}
        # Each adapter has a head of its own where these are.
        self._head_layers = [layer for layer in adapter_layers(base) if layer not in inner]

    def pieces(
        self,
        weights: torch.Tensor,
        inputs: Mapping[str, Any],
        positions: torch.Tensor,
        counts: torch.Tensor,
        length: int,
    ) -> Iterator[AnswerPiece]:
        """Logits at some positions of each row.

        The base model runs on no more pairs of a row and an adapter at once than the batch has rows, and hidden states
        are kept of a few rows at a time, so that memory does not grow with the number of adapters.

        Args:
            weights (`torch.Tensor` of shape `(B, adapters)`): the adapters that are not 0 for a row run on it.
            inputs (`dict`): the base model's inputs.
            positions (`torch.Tensor` of shape `(B, n)`): positions of the answer tokens; ignored for a classifier.
            counts (`torch.Tensor` of shape `(B,)`): how many of them count in each row.
            length (`int`): number of positions of a row.
        """
        size = len(weights)
        if not self._head.usable:
            yield from self._by_whole_logits(weights, inputs, positions)
            return
        for rows in self._blocks(weights, positions.shape[1]):
            own = positions[rows, : max(int(counts[rows].max()), 1)]
            pairs = AdapterRows.from_weights(weights[rows], self._run.names)
            block = {**take_rows(inputs, rows, size), _POSITIONS: own}
            yield from self._behind_bodies(rows, pairs, block, length, None, size)

    def combined(
        self, weights: torch.Tensor, inputs: Mapping[str, Any], combination: str, cache: EnsembleCache | None = None
    ) -> torch.Tensor:
        """Combined outputs `(B, T, V)` at every position, from one run of all pairs of a row and an adapter."""
        pairs = AdapterRows.from_weights(weights, self._run.names)
        rows = torch.arange(len(weights), device=weights.device)
        total: torch.Tensor | None = None
        for piece in self._behind_bodies(rows, pairs, dict(inputs), 0, cache, None):
            own = piece.combined(combination)
            if total is None:
                total = torch.empty(len(weights), piece.length, own.shape[-1], device=own.device)
            total[:, piece.tokens] = own
        return total

    def accepts(self, name: str) -> bool:
        """Whether the base model's forward has an argument of this name."""
        return name in inspect.signature(self._run.forward).parameters

    def _blocks(self, weights: torch.Tensor, tokens: int) -> Iterator[torch.Tensor]:
        """Consecutive rows for which hidden states, and logits of one token, of all their adapters are small."""
        # A head or a hidden size that is not known leaves one row to a block.
        known = self._hidden_size and self._head.width
        most = tokens_at_once(1, max(self._hidden_size * tokens, self._head.width), weights.device) if known else 1
        block: list[int] = []
        filled = 0
        for row, adapters in enumerate((weights != 0).sum(1).tolist()):
            if block and filled + adapters > most:
                yield torch.tensor(block, device=weights.device)
                block, filled = [], 0
            block.append(row)
            filled += adapters
        yield torch.tensor(block, device=weights.device)

    def _behind_bodies(
        self,
        rows: torch.Tensor,
        pairs: AdapterRows,
        inputs: dict[str, Any],
        length: int,
        cache: EnsembleCache | None,
        max_pairs: int | None,
    ) -> Iterator[AnswerPiece]:
        """Run the pairs up to the head; `length` as in [`pieces`]."""
        last: list[BodyRun] = []

        def read(own: dict[str, Any]) -> torch.Tensor:
            last[:] = [self._head.run_body(own, own.pop(_POSITIONS, None), length)]
            return last[0].hidden

        parts: dict[int, list[torch.Tensor]] = {}
        for output in self._run.outputs(pairs, inputs, cache, read, max_pairs):
            parts.setdefault(output.member, []).append(output.values)
        hidden = [own[0] if len(own) == 1 else torch.cat(own) for own in parts.values()]
        parts.clear()
        body = last.pop()
        step = tokens_at_once(sum(pairs.sizes), body.width, hidden[0].device)
        length = hidden[0].shape[1]
        for start in range(0, length, step):
            tokens = slice(start, min(start + step, length))
            yield AnswerPiece(rows, tokens, length, self._members(pairs, [own[:, tokens] for own in hidden], body))

    def _members(self, pairs: AdapterRows, hidden: list[torch.Tensor], body: BodyRun) -> Iterator[MemberOutput]:
        logits: Any = None
        if not self._head_layers:
            logits = self._head.logits(body, torch.cat(hidden)).split(pairs.sizes)
        for k, name in enumerate(pairs.names):
            if logits is not None:
                values = logits[k]
            else:
                with active_adapter(self._head_layers, name):
                    values = self._head.logits(body, hidden[k])
            yield MemberOutput(self._run.names.index(name), pairs.rows[k], pairs.weights[k], values)

    def _by_whole_logits(self, weights, inputs, positions) -> Iterator[AnswerPiece]:
        """The same for a model without a head of its own: a classifier, whose logits are few."""
        pairs = AdapterRows.from_weights(weights, self._run.names)

        def read(own: dict[str, Any]) -> torch.Tensor:
            index = own.pop(_POSITIONS)
            logits = self._run.forward(**own).logits
            if logits.dim() == 2:
                return logits.unsqueeze(1)
            return logits.gather(1, index.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))

        rows = torch.arange(len(weights), device=weights.device)
        outputs = self._run.outputs(pairs, {**inputs, _POSITIONS: positions}, None, read, len(weights))
        length = positions.shape[1]
        yield AnswerPiece(rows, slice(0, length), length, outputs)
