"""Key-value caches of an ensemble: one per adapter, behind the face of one cache."""

import torch
from transformers import DynamicCache


class MemberCaches(DynamicCache):
    """What `generate` holds as its cache while several adapters decode.

    It is empty until the first forward tells the rows of the batch; then `members` maps each adapter to its own cache
    and the rows that it decodes.
    """

    def __init__(self):
        super().__init__()
        self.members: dict[str, tuple[DynamicCache, torch.Tensor]] = {}

    def build(self, weights: torch.Tensor, names: list[str], config) -> None:
        """One cache for each adapter that some row gives a weight; `weights` is `(batch_size, members)`."""
        for column, name in enumerate(names):
            rows = weights[:, column].nonzero().squeeze(1)
            if len(rows):
                self.members[name] = (DynamicCache(config=config), rows)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max((cache.get_seq_length(layer_idx) for cache, _ in self.members.values()), default=0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beams are exchanged within one example, whose beams all use the same adapters."""
        for cache, rows in self.members.values():
            position = torch.zeros(len(beam_idx), dtype=torch.long, device=beam_idx.device)
            position[rows] = torch.arange(len(rows), device=beam_idx.device)
            cache.reorder_cache(position[beam_idx[rows]])

    def crop(self, tokens_to_remove: int) -> None:
        for cache, _ in self.members.values():
            cache.crop(tokens_to_remove)

    def reset(self) -> None:
        for cache, _ in self.members.values():
            cache.reset()

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return all(cache.is_initialized for cache, _ in self.members.values())
