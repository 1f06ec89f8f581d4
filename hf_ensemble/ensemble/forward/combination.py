"""Combining the outputs of several adapters."""

import torch

from ..._settings import check_one_of
from ...errors import EnsembleError

COMBINATIONS = ("logits", "log_probs", "probs", "weights")
# Those whose weights may have any sum: it scales the logits.
SCALED_COMBINATIONS = ("logits", "log_probs")


class CombinedOutputs:
    """Weighted outputs, added adapter by adapter, so that one adapter's logits exist at a time.

    - `logits`: sum_k w_k l_k.
    - `log_probs`: the normalised weighted geometric mean of the distributions, log softmax(sum_k w_k log p_k). The
      softmax of `logits` is the same distribution; these scores are normalised.
    - `probs`: the weighted mean of the distributions, log(sum_k w_k p_k / sum_k w_k). Weights may not be negative.

    Args:
        batch_size (`int`): number of rows in the batch.
        combination (`str`): one of the three.
        mask (`torch.Tensor` of shape `(batch_size, num_labels)`, *optional*):
            Labels that a row may answer with. The distributions of `probs` are over these only.

    Raises:
        `EnsembleError`: for a negative weight with `probs`.
    """

    def __init__(self, batch_size: int, combination: str, mask: torch.Tensor | None = None):
        self.batch_size = batch_size
        self.combination = combination
        self.mask = mask
        self.total: torch.Tensor | None = None
        self.weight_sum: torch.Tensor | None = None
        self._own = False

    def add(self, rows: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor) -> None:
        """Add one adapter's `logits` of shape `(len(rows), ..., V)` with a weight per row; `rows` ascend."""
        logits = logits.float()
        # Of a model that is spread over devices, the logits are on the last one.
        rows, weights = rows.to(logits.device), weights.to(logits.device)
        shaped = weights.view(-1, *[1] * (logits.dim() - 1))
        if self.combination == "probs":
            self._add_probabilities(rows, weights, shaped, logits)
            return
        ones, everywhere = bool((weights == 1).all()), len(rows) == self.batch_size
        if self.total is None and everywhere:
            # The model's own output is never written into.
            self.total, self._own = (logits, False) if ones else (shaped * logits, True)
            return
        if self.total is None:
            self.total = torch.zeros(self.batch_size, *logits.shape[1:], dtype=torch.float32, device=logits.device)
            self._own = True
        if torch.is_grad_enabled() or not self._own:
            self.total, self._own = self.total.index_add(0, rows, shaped * logits), True
        elif everywhere:
            self.total.addcmul_(shaped, logits)
        else:
            self.total.index_add_(0, rows, logits if ones else shaped * logits)

    def _add_probabilities(self, rows, weights, shaped, logits) -> None:
        if bool((weights < 0).any()):
            raise EnsembleError("The combination 'probs' is a mean of distributions: expected no weight below 0.")
        if self.mask is not None:
            logits = logits.masked_fill(~self.mask.to(logits.device)[rows], float("-inf"))
        # In the log domain, so that an improbable token stays finite.
        part = shaped.log() + torch.log_softmax(logits, -1)
        if self.total is None:
            shape = (self.batch_size, *logits.shape[1:])
            self.total = torch.full(shape, float("-inf"), dtype=torch.float32, device=logits.device)
            self.weight_sum = torch.zeros(self.batch_size, dtype=torch.float32, device=logits.device)
        self.total = self.total.index_copy(0, rows, torch.logaddexp(self.total[rows], part))
        self.weight_sum = self.weight_sum.index_add(0, rows, weights.float())

    def result(self) -> torch.Tensor:
        """`(batch_size, ..., V)` in float32: logits, or log-probabilities."""
        if self.combination == "log_probs":
            return torch.log_softmax(self.total, -1)
        if self.combination == "probs":
            sums = self.weight_sum.view(-1, *[1] * (self.total.dim() - 1))
            return self.total - sums.log()
        return self.total


def check_combination(combination: str) -> None:
    """Raise [`EnsembleError`] for an unknown combination."""
    check_one_of("combination", combination, COMBINATIONS, EnsembleError)
