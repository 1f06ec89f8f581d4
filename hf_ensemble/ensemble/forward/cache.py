"""Key-value caches of an ensemble: one per row and adapter, behind the face of one cache."""

from collections.abc import Callable

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedConfig, StaticCache

from ...errors import EnsembleError
from .fused import Stacks
from .rows import AdapterRows


def cache_maker(config: PreTrainedConfig, max_length: int | None = None) -> Callable[[], Cache]:
    """A function that makes an empty cache of the base model: static of `max_length` tokens, or dynamic."""
    decoder = config.get_text_config(decoder=True)

    def make() -> Cache:
        own = DynamicCache(config=decoder) if max_length is None else StaticCache(decoder, max_cache_len=max_length)
        return EncoderDecoderCache(own, DynamicCache(config=decoder)) if config.is_encoder_decoder else own

    return make


class EnsembleCache(DynamicCache):
    """What `generate` and `forward` hold as their cache while several adapters decode.

    It is empty until the first forward tells which adapters each row of the batch uses; then it holds one cache over
    all pairs of a row and an adapter (`fused`), or one for each adapter over its rows.
    """

    def __init__(self, make: Callable[[], Cache]):
        super().__init__()
        self._make = make
        self.parts: list[tuple[Cache, list[torch.Tensor]]] = []
        self._batch: tuple[bool, list] | None = None
        # The adapters' states are theirs alone, so what is stacked of the adapters holds for as long.
        self.stacks = Stacks()

    def of(self, rows: AdapterRows, fused: bool) -> list[Cache]:
        """The caches of a batch, the same ones at every step: one for all adapters, or one for each.

        Raises:
            `EnsembleError`: for a batch of other rows or adapters than the one that the cache was begun with.
        """
        batch = (fused, [(name, own.tolist()) for name, own in zip(rows.names, rows.rows)])
        if not self.parts:
            groups = [rows.rows] if fused else [[own] for own in rows.rows]
            self.parts, self._batch = [(self._make(), group) for group in groups], batch
        if batch != self._batch:
            raise EnsembleError(
                "The cache holds the states of other rows or adapters: expected the tasks and the batch that it was "
                f"begun with, {self._batch[1]}, found {batch[1]}. Begin with past_key_values=None."
            )
        return [cache for cache, _ in self.parts]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max((int(cache.get_seq_length(layer_idx)) for cache, _ in self.parts), default=0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beams are exchanged within one example, whose beams all use the same adapters."""
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
