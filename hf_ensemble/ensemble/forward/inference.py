"""Running a base model with the adapters that each row of a batch weighs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutput

from ..._compat import adapters_untouched
from ...errors import EnsembleError
from ...logging import get_logger
from .cache import EnsembleCache
from .combination import CombinedOutputs
from .fused import CannotFuseError, Stacks, grouped_adapters, summed_adapters
from .rows import AdapterRows, batch_size_of, take_rows

logger = get_logger(__name__)

_BESIDE = "_hf_ensemble_stacks"


class MemberForward:
    """Computes a batch's combined outputs; lives for one call of the ensemble.

    Fused, the base runs once on all pairs of a row and an adapter. Otherwise, and where a layer cannot be served
    so, the adapters run one after the other, each on its rows. Both give the same.

    Args:
        model (`PeftModel`): holds the adapters.
        forward (`Callable`): the base model's own forward.
        names (`Sequence[str]`): adapters, in the order of the weights' columns.
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
        self._stacks = Stacks()
        self._restore = ExitStack()
        # Of an encoder-decoder that generates: the weights of the prompts and each adapter's encoder states.
        self._encoded: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def __enter__(self) -> "MemberForward":
        if not self.fused:
            self._restore.enter_context(adapters_untouched(self.model))
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
        rows = AdapterRows.from_weights(weights, self.names)
        combined = CombinedOutputs(len(weights), self.combination, mask)
        for k, logits in self._logits(rows, inputs, cache):
            combined.add(rows.rows[k], rows.weights[k], logits)
        return combined.result()

    def members(self, inputs: Mapping[str, Any]) -> Iterator[tuple[int, torch.Tensor]]:
        """Number and logits of every adapter, on all rows."""
        weights = torch.ones(batch_size_of(inputs), len(self.names), device=inputs["input_ids"].device)
        yield from self._logits(AdapterRows.from_weights(weights, self.names), inputs, None)

    def encode(self, encoder: torch.nn.Module, weights: torch.Tensor, inputs: Mapping[str, Any]) -> None:
        """Run the encoder once for each pair; later calls decode from these states."""
        rows = AdapterRows.from_weights(weights, self.names)
        own = self.forward
        self.forward = encoder.forward
        try:
            outputs = self._logits(rows, inputs, None, "last_hidden_state")
            self._encoded = (weights, [states for _, states in outputs])
        finally:
            self.forward = own

    def _logits(
        self, rows: AdapterRows, inputs: Mapping[str, Any], cache: EnsembleCache | None, output: str = "logits"
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Number and outputs of each adapter of the batch, over its own rows."""
        if self.fused:
            decoded = 0 if cache is None else cache.get_seq_length()
            try:
                yield from enumerate(self._at_once(rows, inputs, cache, output))
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
                own["past_key_values"] = caches[k]
            self.model.set_adapter(name, inference_mode=True)
            yield k, getattr(self.forward(**own), output)

    def _at_once(self, rows, inputs, cache, output) -> Sequence[torch.Tensor]:
        own = take_rows(inputs, rows.index, rows.batch_size)
        own.update(self._states(rows))
        if cache is not None:
            (own["past_key_values"],) = cache.of(rows, fused=True)
        stacks = self._stacks if cache is None or torch.is_grad_enabled() else cache.stacks
        with grouped_adapters(self.model, rows.names, rows.sizes, stacks):
            outputs = getattr(self.forward(**own), output)
        return outputs.split(rows.sizes)

    def _unfuse(self, cache: EnsembleCache | None) -> None:
        self.fused = False
        self._restore.enter_context(adapters_untouched(self.model))
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


def stacks_beside(cache: Any) -> Stacks:
    """The adapters' concatenated matrices that go with a base model's key-value states: made once for a decoding."""
    known = getattr(cache, _BESIDE, None)
    if known is None or torch.is_grad_enabled():
        return Stacks()
    return known


def keep_beside(cache: Any, stacks: Stacks) -> None:
    """Leave them with the states for the next call."""
    if isinstance(cache, Cache) and not torch.is_grad_enabled():
        setattr(cache, _BESIDE, stacks)


@contextmanager
def summed_weights(
    model: PeftModel, names: Sequence[str], weights: torch.Tensor, stacks: Stacks | None = None
) -> Iterator[None]:
    """While open, the base model computes each row with the weighted sum of the adapters' deltas.

    Args:
        model (`PeftModel`): holds the adapters.
        names (`Sequence[str]`): adapters, in the order of the weights' columns.
        weights (`torch.Tensor` of shape `(batch_size, len(names))`): weight of each adapter for each row.
        stacks (`Stacks`, *optional*): of an earlier call with the same adapters.

    Raises:
        `EnsembleError`: for a model with a layer that cannot be served so.
    """
    used = weights.any(0).nonzero().squeeze(1).tolist()
    try:
        with summed_adapters(model, [names[k] for k in used], weights[:, used], stacks or Stacks()):
            yield
    except CannotFuseError as error:
        raise EnsembleError(
            f"The combination 'weights' cannot be computed: {error} Use 'logits', or merge(task) and load the merged "
            "adapter alone."
        ) from error
