"""Batches of similar length, and of a size that fits into memory."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from ..logging import get_logger
from .sharding import is_sharded

logger = get_logger(__name__)

Row = TypeVar("Row")
Result = TypeVar("Result")


def length_sorted_batches(
    lengths: Sequence[int], max_rows: int, max_tokens: int | None = None, processes: int = 1
) -> list[list[int]]:
    """Positions of rows in batches of similar length, the shortest first.

    Args:
        lengths (`Sequence[int]`): number of tokens of each row.
        max_rows (`int`): largest number of rows that one process takes of a batch.
        max_tokens (`int`, *optional*):
            Largest number of tokens that one process takes of a batch, padding included; it takes a longer row alone.
        processes (`int`, *optional*, defaults to 1): number of processes that share the rows of every batch.
    """
    batches: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lengths.__getitem__):
        # Rows come in ascending order: the newest is what the batch is padded to.
        length, each = lengths[position], -(-(len(batches[-1]) + 1) // processes) if batches else 0
        has_room = max_tokens is None or each * length <= max(max_tokens, length)
        if batches and each <= max_rows and has_room:
            batches[-1].append(position)
        else:
            batches.append([position])
    return batches


class HalvingOnFullMemory:
    """Calls a function on rows, and on halves of them where memory runs out.

    The number of rows that fitted is remembered for later calls.

    Args:
        function (`Callable`): from a list of rows to a result.
        model (`nn.Module`):
            What the function runs. One that is sharded is run by all processes as often: rows are not halved then.
    """

    def __init__(self, function: Callable[[list[Row]], Result], model: nn.Module):
        self._function = function
        self._is_sharded = is_sharded(model)
        self._most: int | None = None

    def __call__(self, rows: Sequence[Row]) -> list[Result]:
        """Results of consecutive pieces of the rows.

        Raises:
            Whatever the function raises; out-of-memory errors if a single row does not fit, or the model is sharded.
        """
        results, waiting = [], [list(rows)]
        while waiting:
            piece = waiting.pop()
            if self._most is not None and len(piece) > self._most:
                waiting += [piece[self._most :], piece[: self._most]]
                continue
            try:
                results.append(self._function(piece))
                continue
            except Exception as error:
                if self._is_sharded or len(piece) == 1 or not should_reduce_batch_size(error):
                    raise
            # Outside of the handler: the exception holds the tensors of the failed attempt.
            clear_device_cache(garbage_collection=True)
            self._most = (len(piece) + 1) // 2
            logger.warning("%d rows at once do not fit into memory: continuing with %d.", len(piece), self._most)
            waiting.append(piece)
        return results
