"""Which rows of a batch each adapter runs on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import EnsembleError

# What a call may ask for that is not the ensemble's own.
NO_STATES = "an ensemble has logits, but no attentions or hidden states of its own"
_STATES = ("output_attentions", "output_hidden_states")
EACH_ITS_OWN = "each adapter of an ensemble keeps its own states"
# Inputs whose first dimension is not the batch, whatever its length.
_SHARED_INPUTS = ("cache_position", "logits_to_keep")


@dataclass(frozen=True)
class AdapterRows:
    """The pairs of a row and an adapter that has a weight for it, adapter by adapter.

    Args:
        names (`list[str]`): adapters with a weight for some row.
        rows (`list[torch.Tensor]`): ascending row numbers of each of these adapters.
        weights (`list[torch.Tensor]`): weight of the adapter for each of its rows.
        batch_size (`int`): number of rows in the batch.
    """

    names: list[str]
    rows: list[torch.Tensor]
    weights: list[torch.Tensor]
    batch_size: int

    @classmethod
    def from_weights(cls, weights: torch.Tensor, names: Sequence[str]) -> "AdapterRows":
        """The non-zero entries of `weights`, `(batch_size, adapters)`."""
        used = [(name, weights[:, column].nonzero().squeeze(1), column) for column, name in enumerate(names)]
        used = [(name, rows, weights[rows, column]) for name, rows, column in used if len(rows)]
        return cls([name for name, _, _ in used], [rows for _, rows, _ in used], [w for _, _, w in used], len(weights))

    @property
    def index(self) -> torch.Tensor:
        """Row of each pair, `(pairs,)`."""
        return torch.cat(self.rows)

    def parts(self, max_pairs: int | None) -> Iterator["AdapterRows"]:
        """Consecutive pairs, `max_pairs` of them at a time; all at once by default."""
        if max_pairs is None or sum(self.sizes) <= max_pairs:
            yield self
            return
        pairs = [(k, i) for k, size in enumerate(self.sizes) for i in range(size)]
        for start in range(0, len(pairs), max_pairs):
            own: dict[int, list[int]] = {}
            for k, i in pairs[start : start + max_pairs]:
                own.setdefault(k, []).append(i)
            yield AdapterRows(
                [self.names[k] for k in own],
                [self.rows[k][i[0] : i[-1] + 1] for k, i in own.items()],
                [self.weights[k][i[0] : i[-1] + 1] for k, i in own.items()],
                self.batch_size,
            )

    @property
    def sizes(self) -> list[int]:
        """Number of rows of each adapter."""
        return [len(rows) for rows in self.rows]


def model_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the base model is called with: the inputs that are given, without the form of its output.

    Raises:
        `EnsembleError`: where attentions or hidden states are asked for, and for states of a single model.
    """
    if inputs.get("encoder_outputs") is not None:
        raise EnsembleError(f"encoder_outputs cannot be set: {EACH_ITS_OWN}. Pass input_ids.")
    for name in _STATES:
        if inputs.get(name):
            raise EnsembleError(
                f"{name} cannot be set: {NO_STATES}. Call model.model, the PeftModel, for an adapter's."
            )
    return {key: value for key, value in inputs.items() if value is not None and key not in (*_STATES, "return_dict")}


def batch_size_of(inputs: Mapping[str, Any]) -> int:
    """Number of rows in a model's inputs.

    Raises:
        `EnsembleError`: without a tensor with a row for each example.
    """
    of_rows = (v for k, v in inputs.items() if torch.is_tensor(v) and v.dim() and k not in _SHARED_INPUTS)
    first = next(of_rows, None)
    if first is None:
        raise EnsembleError(f"Expected input_ids with a row for each example, found {sorted(inputs) or 'no inputs'}.")
    return first.shape[0]


def take_rows(inputs: Mapping[str, Any], rows: torch.Tensor, batch_size: int) -> dict[str, Any]:
    """The inputs of some rows; inputs without a row dimension are passed on as they are."""
    if len(rows) == batch_size and torch.equal(rows, torch.arange(batch_size, device=rows.device)):
        return dict(inputs)
    return {key: _take(key, value, rows, batch_size) for key, value in inputs.items()}


def _take(key: str, value: Any, rows: torch.Tensor, batch_size: int) -> Any:
    if not torch.is_tensor(value) or not value.dim() or key in _SHARED_INPUTS:
        return value
    if key.endswith("position_ids") and value.dim() == 3:  # positions along several axes come first, (axes, batch, T)
        return value[:, rows] if value.shape[1] == batch_size else value
    return value[rows] if value.shape[0] == batch_size else value
