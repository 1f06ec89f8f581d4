"""Key-value caches of an ensemble: one per row and adapter, behind the interface of one cache."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedConfig, StaticCache

from ...errors import EnsembleError
from .fused import Stacks
from .rows import AdapterRows

_WEIGHTS_ATTRIBUTE = "_hf_ensemble_weights"


def cache_argument(forward: Callable) -> str:
    """What a base model's forward calls the states of earlier calls: `past_key_values`, or `cache_params` in Mamba."""
    accepted = inspect.signature(forward).parameters
    return "cache_params" if "cache_params" in accepted and "past_key_values" not in accepted else "past_key_values"


def makes_caches(base: nn.Module) -> bool:
    """Whether a base that generates keeps its states in a cache of transformers, of which each adapter may have one."""
    return base._supports_default_dynamic_cache()


def check_cache(base: nn.Module, use_cache: bool) -> None:
    """Raise [`EnsembleError`] where a cache is asked for that the base does not have."""
    if use_cache and not makes_caches(base):
        raise EnsembleError(
            f"Expected use_cache=False, found {use_cache!r}: {type(base).__name__} keeps states of a kind of its own, "
            "which an ensemble cannot keep for each adapter. Pass the whole text in every call."
        )


def holds_states(cache: Any) -> bool:
    """Whether a forward has filled the cache of earlier calls, the ensemble's or the base model's."""
    if isinstance(cache, EnsembleCache):
        return bool(cache.parts)
    try:
        return cache is not None and cache.get_seq_length() > 0
    except ValueError:  # Recurrent states alone have no length.
        return cache.has_previous_state()


def keep_weights(cache: Any, weights: torch.Tensor) -> None:
    """Keep the weights `(B, adapters)` of the rows for the next call, whose tokens alone do not tell them."""
    if isinstance(cache, Cache):
        setattr(cache, _WEIGHTS_ATTRIBUTE, weights)


def kept_weights(cache: Any, batch_size: int) -> torch.Tensor:
    """What [`keep_weights`] kept.

    Raises:
        `EnsembleError`: for a cache of another model, and for another number of rows.
    """
    weights = getattr(cache, _WEIGHTS_ATTRIBUTE, None)
    if weights is None or len(weights) != batch_size:
        found = "one without weights" if weights is None else f"weights of {len(weights)} rows"
        raise EnsembleError(
            f"Expected past_key_values of an earlier call, with the weights that the routing gave its {batch_size} "
            f"prompts; found {found}. Pass task=, or start with past_key_values=None and the whole prompts."
        )
    return weights


def cache_maker(config: PreTrainedConfig, max_length: int | None = None) -> Callable[[], Cache]:
    """A function that makes an empty cache for the base model, static with `max_length` tokens or dynamic."""
    decoder = config.get_text_config(decoder=True)

    def make() -> Cache:
        own = DynamicCache(config=decoder) if max_length is None else StaticCache(decoder, max_cache_len=max_length)
        return EncoderDecoderCache(own, DynamicCache(config=decoder)) if config.is_encoder_decoder else own

    return make


class EnsembleCache(DynamicCache):
    """The cache of `generate` and `forward` while several adapters decode.

    It is empty until the first forward, which sets the adapters of each row. Then it holds one cache for all pairs of a
    row and an adapter (`fused`), or one per adapter for its rows.
    """

    def __init__(self, make: Callable[[], Cache]):
        super().__init__()
        self._make = make
        self.parts: list[tuple[Cache, list[torch.Tensor]]] = []
        self._batch: tuple[bool, list] | None = None
        self._records_past = False
        # States belong to the adapters as they are, so their stacked matrices may be kept as long.
        self.stacks = Stacks()

    def of(self, rows: AdapterRows, fused: bool) -> list[Cache]:
        """The caches of a batch, the same at every step: one for all adapters, or one per adapter.

        Raises:
            `EnsembleError`: for a batch of other rows or adapters than those of the first call.
        """
        batch = (fused, [(name, own.tolist()) for name, own in zip(rows.names, rows.rows)])
        if not self.parts:
            groups = [rows.rows] if fused else [[own] for own in rows.rows]
            self.parts, self._batch = [(self._new_part(), group) for group in groups], batch
        if batch != self._batch:
            raise EnsembleError(
                "The cache holds the states of other rows or adapters: expected the batch and tasks of its first call, "
                f"{self._batch[1]}, found {batch[1]}. Start with past_key_values=None."
            )
        return [cache for cache, _ in self.parts]

    def _new_part(self) -> Cache:
        part = self._make()
        if self._records_past:
            _record_past(part)
        return part

    def activate_past_recording(self) -> None:
        """Keep what assisted decoding may roll back to, also beyond a sliding window."""
        self._records_past = True
        for cache, _ in self.parts:
            _record_past(cache)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max((int(cache.get_seq_length(layer_idx)) for cache, _ in self.parts), default=0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beams change places within one example, whose beams all use the same adapters."""
        for cache, groups in self.parts:
            order, offset = [], 0
            for rows in groups:
                position = torch.zeros(len(beam_idx), dtype=torch.long, device=beam_idx.device)
                position[rows] = torch.arange(offset, offset + len(rows), device=beam_idx.device)
                order.append(position[beam_idx[rows]])
                offset += len(rows)
            cache.reorder_cache(torch.cat(order))

    def crop(self, tokens_to_remove: int) -> None:
        for cache, _ in self.parts:
            cache.crop(tokens_to_remove)

    def reset(self) -> None:
        self.parts = []

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return all(cache.is_initialized for cache, _ in self.parts)


def _record_past(cache: Cache) -> None:
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    own.activate_past_recording()
