"""Every adapter's outputs at a task's answers, kept on the CPU within a cap."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedConfig

from ...errors import EnsembleError
from ...logging import get_logger
from ...models.answer_head import answer_tokens
from ...models.batches import HalvingOnFullMemory, length_sorted_batches
from ...models.precision import autocast
from ...models.usage import UsageCounter
from ...tasks import IGNORE_INDEX, pop_meta, token_scores
from ..forward.scoring import MemberTokens
from ..members import EnsembleMember
from .collation import Collator
from .objectives import (
    Objective,
    example_means,
    logits_losses,
    logits_objective,
    probs_losses,
    probs_objective,
    routed_losses,
    token_shares,
)
from .sampling import evenly_spaced, spread_sample, tokens_per_row

logger = get_logger(__name__)

Rows = Sequence[Mapping[str, Any]]


class Members(Protocol):
    """What a [`PeftEnsembleModel`] tells of its adapters' outputs."""

    members: Sequence[EnsembleMember]
    adapter_names: list[str]
    combination: str
    config: PreTrainedConfig
    device: torch.device
    num_outputs: int

    def prepare(self, inputs: Mapping[str, Any], labels: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
        """Inputs and labels as they are scored."""

    def member_answers(self, labels: torch.Tensor, task: str, **inputs: Any) -> Iterator[MemberTokens]:
        """Each adapter's logits at the answer tokens of a batch."""

    def prompt_states(self, inputs: Mapping[str, Any], labels: torch.Tensor | None) -> torch.Tensor:
        """Mean hidden states of the base model over the prompts of a batch."""


@dataclass(frozen=True)
class CollectedAnswers:
    """What the adapters say of the answers of one task; `n` answer tokens.

    Args:
        values (`torch.Tensor`):
            Logits `(m, n, V)` of each adapter; or only the log-probabilities `(m, n)` of the answer tokens.
        targets (`torch.Tensor` of shape `(n,)`): the answer tokens.
        rows (`torch.Tensor` of shape `(n,)`): number of the row that each token belongs to, from 0 on.
        tokens (`torch.Tensor` of shape `(n,)`, *optional*): these tokens' numbers where the values hold others too.
    """

    values: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    tokens: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        return int(self.rows.max()) + 1

    def objective(self, combination: str) -> Objective:
        """Mean loss over the rows, with gradient and Hessian, as a function of the weights."""
        if combination == "probs":
            return probs_objective(self.log_probs(), self.rows)
        return logits_objective(self.values, self.targets, self.rows, self.tokens)

    def row_losses(self, weights: np.ndarray, combination: str) -> np.ndarray:
        """Loss of each row, `(J, rows)`, under each of J sets of weights `(J, m)`."""
        if combination == "probs":
            return probs_losses(self.log_probs(), self.rows, weights)
        return logits_losses(self.values, self.targets, self.rows, weights, self.tokens)

    def routed_losses(self, weights: torch.Tensor, combination: str) -> np.ndarray:
        """Loss of each row, `(rows,)`, with weights of its own, `(rows, m)`."""
        if combination == "probs":
            mixed = torch.logsumexp(weights.log().double()[self.rows].T + self.log_probs().double(), 0)
            return example_means(-mixed[None], self.rows)[0]
        return routed_losses(self.values, self.targets, self.rows, weights, self.tokens)

    def token_shares(self) -> torch.Tensor:
        """What each token's loss counts in the mean over rows of the mean over their tokens, `(n,)`."""
        return token_shares(self.rows)

    def of_rows(self, numbers: np.ndarray) -> "CollectedAnswers":
        """The answers of some rows, numbered anew; the values are shared."""
        renumbered = torch.full((self.num_rows,), -1)
        renumbered[torch.from_numpy(numbers)] = torch.arange(len(numbers))
        kept = (renumbered[self.rows] >= 0).nonzero().squeeze(1)
        tokens = kept if self.tokens is None else self.tokens[kept]
        return CollectedAnswers(self.values, self.targets[kept], renumbered[self.rows[kept]], tokens)

    def of_members(self, numbers: Sequence[int]) -> "CollectedAnswers":
        """The answers of some of the adapters; of all of them these answers themselves, of which no copy is made."""
        if list(numbers) == list(range(len(self.values))):
            return self
        return replace(self, values=self.values[list(numbers)])

    def combined(self, weights: np.ndarray) -> "CollectedAnswers":
        """The combined logits, as those of a single adapter."""
        values = self.values if self.tokens is None else self.values[:, self.tokens]
        impossible = values.isneginf().any(0)
        mixed = torch.einsum("m,mnv->nv", torch.from_numpy(weights).to(values), values.masked_fill(impossible, 0.0))
        return CollectedAnswers(mixed.masked_fill(impossible, float("-inf"))[None], self.targets, self.rows)

    def log_probs(self) -> torch.Tensor:
        """Log-probability of each answer token under each adapter, `(m, n)`."""
        values = self.values if self.tokens is None else self.values[:, self.tokens]
        return values if values.dim() == 2 else torch.stack([token_scores(own, self.targets)[0] for own in values])


@dataclass(frozen=True)
class AnswerCollector:
    """Runs an ensemble's adapters over rows and keeps what they say of the answers.

    Args:
        members (`Members`): the ensemble.
        collate (`Callable`): from rows to a batch with `labels`.
        batch_size (`int`): rows per batch, at most; batches are halved where memory runs out.
        max_values (`int`): most values to keep, of 4 bytes each; at least `values_per_token` and `values_per_row`.
        max_rows (`int`, *optional*): most rows to use; a sample of them is drawn from larger tasks.
        seed (`int`): seed of the samples.
        log_probs_only (`bool`): keep the log-probability of each answer token in place of its logits.
        mixed_precision (`str`): see [`autocast`].
        values_per_row (`int`): values that are kept of a row beside those of its answer, see [`states`].
    """

    members: Members
    collate: Collator
    batch_size: int
    max_values: int
    max_rows: int | None
    seed: int
    log_probs_only: bool
    mixed_precision: str
    values_per_row: int = 0

    def __call__(self, task: str, rows: Rows) -> CollectedAnswers:
        """Outputs at the answers of one task's rows.

        Where not all answer tokens fit, rows are sampled over the whole set and the tokens within a row are evenly
        spaced. What is kept depends on the rows and the seed, not on the batch size.

        Raises:
            `EnsembleError`: for rows without labels or without an answer.
        """
        chosen = self._chosen(rows)
        budget = (self.max_values - len(chosen) * self.values_per_row) // self.values_per_token
        own = [rows[i] for i in chosen]
        counts, lengths = self._count(task, own, chosen)
        kept = tokens_per_row(counts, budget)
        if len(own) < min(len(rows), self.max_rows or len(rows)) or kept != counts:
            logger.warning(
                "The weights of %r are fitted to %d answer tokens of %d rows: max_values=%d does not hold all %d rows.",
                task,
                sum(kept),
                len(own),
                self.max_values,
                len(rows),
            )
        return self._collect(task, own, kept, length_sorted_batches(lengths, self.batch_size))

    def states(self, rows: Rows) -> torch.Tensor:
        """Mean hidden states of the base model over the prompts of the same rows, `(rows, H)` in float32."""
        return self._states(rows, self._chosen(rows))

    def states_of_prompts(self, rows: Rows, max_rows: int | None) -> torch.Tensor:
        """[`states`] of at most `max_rows` rows whose answers are not kept; they need no labels."""
        budget = self.max_values // max(1, self.values_per_row)
        return self._states(rows, spread_sample(len(rows), min(budget, max_rows or budget), self.seed))

    @torch.no_grad()
    def _states(self, rows: Rows, chosen: list[int]) -> torch.Tensor:
        device = self.members.device

        def run(batch: list[int]) -> torch.Tensor:
            inputs, labels = self._inputs([rows[i] for i in batch])
            inputs = {key: value.to(device) if torch.is_tensor(value) else value for key, value in inputs.items()}
            labels = None if labels is None else labels.to(device)
            with usage.batch(inputs, labels), autocast(device, self.mixed_precision):
                return self.members.prompt_states(inputs, labels).cpu()

        run_halving = HalvingOnFullMemory(run, self.members)
        with UsageCounter() as usage:
            starts = range(0, len(chosen), self.batch_size)
            return torch.cat(
                [part for start in starts for part in run_halving(chosen[start : start + self.batch_size])]
            )

    def _chosen(self, rows: Rows) -> list[int]:
        budget = self.max_values // (self.values_per_token + self.values_per_row)
        return spread_sample(len(rows), min(budget, self.max_rows or budget), self.seed)

    @property
    def values_per_token(self) -> int:
        """How many values are kept for one answer token."""
        return len(self.members.adapter_names) * (1 if self.log_probs_only else self.members.num_outputs)

    def _count(self, task: str, rows: Rows, numbers: Sequence[int]) -> tuple[list[int], list[int]]:
        """Answer tokens and length of each row."""
        counts: list[int] = []
        lengths: list[int] = []
        for start in range(0, len(rows), self.batch_size):
            inputs, labels = self._batch(task, rows[start : start + self.batch_size])
            self._check_range(task, inputs, labels, numbers[start : start + self.batch_size])
            counts += (answer_tokens(labels, self._shift)[1] != IGNORE_INDEX).sum(1).tolist()
            mask = inputs.get("attention_mask")
            ids = next(value for value in inputs.values() if torch.is_tensor(value))
            lengths += [ids.shape[1]] * len(labels) if mask is None else mask.sum(1).tolist()
        if not all(counts):
            raise EnsembleError(
                f"Expected an answer in every row of {task!r}, found no answer token in row "
                f"{numbers[counts.index(0)]}: all labels are -100. Drop such rows."
            )
        return counts, lengths

    def _check_range(self, task: str, inputs: Mapping[str, Any], labels: torch.Tensor, numbers: Sequence[int]) -> None:
        """Raise `EnsembleError` for token ids and labels that the model does not have."""
        vocabulary = getattr(self.members.config.get_text_config(), "vocab_size", None)
        found = (("token ids", inputs.get("input_ids"), vocabulary), ("labels", labels, self.members.num_outputs))
        for what, values, size in found:
            if values is None or size is None:
                continue
            outside = (values < 0) | (values >= size)
            if what == "labels":
                outside &= values != IGNORE_INDEX
            rows = outside.reshape(len(values), -1).any(1)
            if rows.any():
                raise EnsembleError(
                    f"Expected {what} from 0 to {size - 1} in the rows of {task!r}, found {int(values[outside][0])} in "
                    f"row {numbers[int(rows.nonzero()[0])]}. Correct the row or drop it."
                )

    def _batch(self, task: str, rows: Rows) -> tuple[dict[str, Any], torch.Tensor]:
        inputs, labels = self._inputs(rows)
        if labels is None:
            raise EnsembleError(f"The rows of {task!r} have no labels to fit weights to. Add a column 'labels'.")
        return inputs, labels

    def _inputs(self, rows: Rows) -> tuple[dict[str, Any], torch.Tensor | None]:
        batch = dict(self.collate(list(rows)))
        pop_meta(batch)
        labels = batch.pop("labels", None)
        return (batch, None) if labels is None else self.members.prepare(batch, labels)

    @torch.no_grad()
    def _collect(self, task: str, rows: Rows, kept: list[int], batches: list[list[int]]) -> CollectedAnswers:
        ends = torch.tensor(kept).cumsum(0)
        shape = [len(self.members.adapter_names), int(ends[-1])]
        values = torch.empty(shape if self.log_probs_only else [*shape, self.members.num_outputs])
        targets = torch.empty(shape[1], dtype=torch.long)
        device = self.members.device

        def run(batch: list[int]) -> None:
            inputs, labels = self._batch(task, [rows[i] for i in batch])
            labels = keep_tokens(labels, [kept[i] for i in batch], self._shift)
            numbers = torch.cat([torch.arange(int(ends[i]) - kept[i], int(ends[i])) for i in batch])
            found = answer_tokens(labels, self._shift)[1]
            targets[numbers] = found[found != IGNORE_INDEX]
            inputs = {key: value.to(device) if torch.is_tensor(value) else value for key, value in inputs.items()}
            with usage.batch(inputs, labels), autocast(device, self.mixed_precision):
                for member, tokens, answers, logits in self.members.member_answers(labels.to(device), task, **inputs):
                    own = token_scores(logits, answers)[0] if self.log_probs_only else logits
                    values[member, numbers[tokens.cpu()]] = own.cpu()

        run_halving = HalvingOnFullMemory(run, self.members)
        with UsageCounter() as usage:
            for batch in batches:
                run_halving(batch)
        return CollectedAnswers(values, targets, torch.arange(len(rows)).repeat_interleave(torch.tensor(kept)))

    @property
    def _shift(self) -> bool:
        return not getattr(self.members.config, "is_encoder_decoder", False)


def keep_tokens(labels: torch.Tensor, kept: Sequence[int], shift: bool) -> torch.Tensor:
    """Labels `(B, T)` with -100 at all answer tokens but `kept` evenly spaced ones of each row; `(B,)` as they are."""
    if labels.dim() == 1:
        return labels
    labels = labels.clone()
    for row, size in enumerate(kept):
        positions = (labels[row, int(shift) :] != IGNORE_INDEX).nonzero().flatten() + int(shift)
        left_out = torch.ones(len(positions), dtype=torch.bool)
        left_out[evenly_spaced(len(positions), size)] = False
        labels[row, positions[left_out]] = IGNORE_INDEX
    return labels
