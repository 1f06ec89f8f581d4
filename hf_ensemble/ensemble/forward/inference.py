"""Running a base model with the adapters of each row of a batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers.modeling_outputs import BaseModelOutput

from ..._compat import preserve_active_adapter
from ...errors import EnsembleError
from ...logging import get_logger
from .adapter_layers import CannotFuseError
from .cache import EnsembleCache, cache_argument, holds_states
from .combination import CombinedOutputs
from .fused import Stacks, grouped_adapters
from .rows import AdapterRows, take_rows

logger = get_logger(__name__)


class MemberOutput(NamedTuple):
    """What one adapter gives for some rows of a batch.

    Args:
        member (`int`): number of the adapter.
        rows (`torch.Tensor` of shape `(r,)`): ascending row numbers.
        weights (`torch.Tensor` of shape `(r,)`): weight of the adapter for each of them.
        values (`torch.Tensor` of shape `(r, ...)`): the outputs.
    """

    member: int
    rows: torch.Tensor
    weights: torch.Tensor
    values: torch.Tensor


class MemberForward:
    """Runs the base model with the adapters of each row; lives for one call of the ensemble.

    Fused, the base runs once on all pairs of a row and an adapter. Otherwise, and where a layer cannot be fused, the
    adapters run one after the other, each on its rows. Both give the same outputs.

    Args:
        model (`PeftModel`): holds the adapters.
        forward (`Callable`): the base model's own forward.
        names (`Sequence[str]`): adapter names, in the order of the weights' columns.
        combination (`str`): `logits`, `log_probs` or `probs`.
        fused (`bool`): whether to run all adapters at once.
    """

    def __init__(
        self, model: PeftModel, forward: Callable, names: Sequence[str], combination: str = "logits", fused: bool = True
    ):
        self.model = model
        self.forward = forward
        self.names = list(names)
        self.combination = combination
        self.fused = fused
        self._cache_argument = cache_argument(forward)
        self._stacks = Stacks()
        self._restore = ExitStack()
        # While an encoder-decoder generates: the weights of the prompts and each adapter's encoder states.
        self._encoded: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def __enter__(self) -> "MemberForward":
        if not self.fused:
            self._restore.enter_context(preserve_active_adapter(self.model))
        return self

    def __exit__(self, *error: Any) -> None:
        self._restore.close()

    def __call__(
        self,
        weights: torch.Tensor,
        inputs: Mapping[str, Any],
        cache: EnsembleCache | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Combined outputs `(batch_size, ..., V)`; `weights` is `(batch_size, adapters)`."""
        combined = CombinedOutputs(len(weights), self.combination, mask)
        for output in self.outputs(AdapterRows.from_weights(weights, self.names), inputs, cache):
            combined.add(output.rows, output.weights, output.values)
        return combined.result()

    def encode(self, encoder: torch.nn.Module, weights: torch.Tensor, inputs: Mapping[str, Any]) -> None:
        """Run the encoder once for each pair; later calls decode from these states."""
        rows = AdapterRows.from_weights(weights, self.names)
        outputs = self.outputs(rows, inputs, read=lambda own: encoder.forward(**own).last_hidden_state)
        self._encoded = (weights, [output.values for output in outputs])

    def outputs(
        self,
        rows: AdapterRows,
        inputs: Mapping[str, Any],
        cache: EnsembleCache | None = None,
        read: Callable[[dict[str, Any]], torch.Tensor] | None = None,
        max_pairs: int | None = None,
    ) -> Iterator[MemberOutput]:
        """Outputs of each adapter on its rows, in the order of the adapters.

        Args:
            rows (`AdapterRows`): the pairs to run.
            inputs (`dict`): the base model's inputs, of the whole batch.
            cache (`EnsembleCache`, *optional*): key-value states of all pairs.
            read (`Callable`, *optional*): from the inputs of some pairs to a tensor with one row per pair; the base
                model's logits by default.
            max_pairs (`int`, *optional*): pairs to run at once. Without a cache only.
        """
        read = read or (lambda own: self.forward(**own).logits)
        if not self.fused or max_pairs is None:
            yield from self._run(rows, inputs, cache, read, self._stacks)
            return
        for part in rows.parts(max_pairs):
            # Stacks of all parts would add up to a copy of every adapter.
            yield from self._run(part, inputs, cache, read, Stacks())

    def _run(self, rows: AdapterRows, inputs, cache, read, stacks: Stacks) -> Iterator[MemberOutput]:
        if self.fused:
            decoded = holds_states(cache)
            try:
                for k, values in enumerate(self._at_once(rows, inputs, cache, read, stacks)):
                    yield self._output(rows, k, values)
                return
            except CannotFuseError as error:
                if decoded:
                    raise EnsembleError(f"A layer changed its rows while decoding: {error} Set fused=False.") from error
                logger.warning_once(f"{error} The adapters run one after the other, which takes longer.")
                self._unfuse(cache)
        caches = None if cache is None else cache.of(rows, fused=False)
        for k, name in enumerate(rows.names):
            own = take_rows(inputs, rows.rows[k], rows.batch_size)
            own.update(self._states(rows, k))
            if caches is not None:
                own[self._cache_argument] = caches[k]
            self.model.set_adapter(name, inference_mode=True)
            yield self._output(rows, k, read(own))

    def _output(self, rows: AdapterRows, k: int, values: torch.Tensor) -> MemberOutput:
        return MemberOutput(self.names.index(rows.names[k]), rows.rows[k], rows.weights[k], values)

    def _at_once(self, rows, inputs, cache, read, stacks: Stacks) -> Sequence[torch.Tensor]:
        own = take_rows(inputs, rows.index, rows.batch_size)
        own.update(self._states(rows))
        if cache is not None:
            (own[self._cache_argument],) = cache.of(rows, fused=True)
            stacks = stacks if torch.is_grad_enabled() else cache.stacks
        with grouped_adapters(self.model, rows.names, rows.sizes, stacks):
            return read(own).split(rows.sizes)

    def _unfuse(self, cache: EnsembleCache | None) -> None:
        self.fused = False
        self._restore.enter_context(preserve_active_adapter(self.model))
        if cache is not None:
            cache.reset()

    def _states(self, rows: AdapterRows, k: int | None = None) -> dict[str, BaseModelOutput]:
        """Encoder states of all pairs, or of adapter `k`'s, in place of those that `generate` passes along."""
        if self._encoded is None:
            return {}
        weights, states = self._encoded
        expanded = [own.repeat_interleave(rows.batch_size // len(weights), 0) for own in states]
        own = torch.cat(expanded) if k is None else expanded[k]
        return {"encoder_outputs": BaseModelOutput(last_hidden_state=own)}
