"""What running batches through a model takes: floating point operations and tokens."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..tasks import IGNORE_INDEX
from .flop_counter import FlopCounter

# Batches of one kind whose labels are counted before they are run; of later ones only those of a new shape.
_NUM_FIRST = 16
# Of one kind that are counted, at most; nine at most are linearly independent.
_MAX_SAMPLES = 32
# Numbers that make up a shape, the last two of which depend on where labels are.
_NUM_SHAPES = 9
_OF_LABELS = 2
# How much larger than all that were counted a batch may be in any respect, to be extrapolated to.
_REACH = 1.5
# Part of a batch's shape, relative to it, that those counted before do not explain.
_NEW = 1e-6


@dataclass
class Usage:
    """What some work took.

    Args:
        flops (`float`): floating point operations, see [`FlopCounter`].
        tokens (`int`): that were read or generated, padding apart.
        padding (`int`): tokens of padding that were computed beside them.
        seconds (`float`): wall time of earlier stretches of work that was resumed.
    """

    flops: float = 0.0
    tokens: int = 0
    padding: int = 0
    seconds: float = 0.0

    def add(self, other: "Usage") -> None:
        self.flops += other.flops
        self.tokens += other.tokens
        self.padding += other.padding
        self.seconds += other.seconds


class _Open(threading.local):
    """Usages of the work that goes on in a thread, outermost first."""

    def __init__(self):
        self.usages: list[Usage] = []


_open = _Open()


@contextmanager
def measured_usage() -> Iterator[Usage]:
    """While open, what [`UsageCounter`]s of this thread count is added to the yielded usage, too."""
    usage = Usage()
    _open.usages.append(usage)
    try:
        yield usage
    finally:
        # By identity: another one may hold the same figures.
        _open.usages[:] = [own for own in _open.usages if own is not usage]


class FlopSamples:
    """Operations of batches of one kind, as a linear function of their shapes.

    A batch of B rows and T tokens in a transformer takes a + B (b + c T + d T^2) operations, and e for each token with
    a label where the head runs on these alone; a decoder of its own adds terms in its length. The coefficients come
    from batches that were counted, of which few are needed, whatever the architecture, the adapters, the frozen
    parameters and the checkpointing of activations are.
    """

    def __init__(self):
        self._shapes: list[np.ndarray] = []
        self._flops: list[float] = []
        self._num_seen = 0

    def wants(self, shape: np.ndarray) -> bool:
        """Whether to look at a batch whose shape is known but for its number of labels."""
        self._num_seen += 1
        if len(self._flops) >= _MAX_SAMPLES:
            return False
        return self._num_seen <= _NUM_FIRST or not self.explain(shape, _NUM_SHAPES - _OF_LABELS)

    def takes_more(self) -> bool:
        """Whether fewer batches were counted than a shape has numbers."""
        return len(self._flops) < _NUM_SHAPES

    def add(self, shape: np.ndarray, flops: float) -> None:
        """Learn the operations of a batch."""
        self._shapes.append(shape)
        self._flops.append(flops)

    def explain(self, shape: np.ndarray, size: int | None = None) -> bool:
        """Whether a batch's shape, or its first entries, is a combination of those that were counted, and none of its
        entries much larger."""
        if not self._shapes:
            return False
        known, scale = self._scaled()
        if (shape[:size] > _REACH * scale[:size]).any():
            return False
        known, shape = known[:, :size].T, (shape / scale)[:size]
        rest = shape - known @ np.linalg.lstsq(known, shape, rcond=None)[0]
        return bool(np.linalg.norm(rest) <= _NEW * np.linalg.norm(shape))

    def predict(self, shape: np.ndarray) -> float:
        """Operations of batches whose shapes sum up to this one."""
        if not self._shapes or not shape.any():
            return 0.0
        known, scale = self._scaled()
        return float(round((shape / scale) @ np.linalg.lstsq(known, np.array(self._flops), rcond=None)[0]))

    def _scaled(self) -> tuple[np.ndarray, np.ndarray]:
        known = np.stack(self._shapes)
        scale = np.maximum(np.abs(known).max(axis=0), 1.0)
        return known / scale, scale


class UsageCounter:
    """Counts what one loop over batches takes: some batches are counted, the others follow from their shapes.

    While open, its sums are its own; when it is closed they are added to every open [`measured_usage`].

    Args:
        samples (`FlopSamples`, *optional*): what is known of batches of this kind; new ones by default.
        is_compiled (`bool`, *optional*, defaults to `False`): operations of compiled graphs cannot be counted.
    """

    def __init__(self, samples: FlopSamples | None = None, is_compiled: bool = False):
        self.samples = FlopSamples() if samples is None else samples
        self.is_compiled = is_compiled
        self._counted = Usage()
        self._uncounted: np.ndarray = np.zeros(_NUM_SHAPES)
        self._numbers: torch.Tensor | None = None

    def __enter__(self) -> "UsageCounter":
        return self

    def __exit__(self, *error: Any) -> None:
        total = self.total()
        for usage in _open.usages:
            usage.add(total)

    def resume(self, usage: Usage) -> None:
        """Go on from what an interrupted loop had counted."""
        self._counted.add(usage)

    def total(self) -> Usage:
        """What the batches so far took."""
        total = Usage(**vars(self._counted))
        extra = self._read()
        total.flops += 0.0 if self.is_compiled else self.samples.predict(self._uncounted + _labels(*extra[2:]))
        total.tokens += int(extra[0])
        total.padding += int(extra[1])
        return total

    @contextmanager
    def batch(
        self, inputs: Mapping[str, Any], labels: torch.Tensor | None = None, is_typical: bool = True
    ) -> Iterator[None]:
        """While open, a batch is run.

        Args:
            inputs (`dict`): as the model takes them, labels among them or beside them.
            labels (`torch.Tensor`, *optional*): labels that stand beside.
            is_typical (`bool`, *optional*, defaults to `True`): whether other batches take as much.
        """
        ids = inputs.get("input_ids")
        labels = inputs.get("labels") if labels is None else labels
        if not torch.is_tensor(ids) or ids.dim() != 2:
            # Of other inputs a batch's shape is not known: each is counted.
            with FlopCounter() as counter:
                yield
            self._counted.flops += counter.flops
            return
        rows, length = ids.shape
        is_per_token = torch.is_tensor(labels) and labels.dim() == 2
        other = labels.shape[1] if is_per_token and labels.shape != ids.shape else 0
        shape = _shape(rows, length, other)
        mask = inputs.get("attention_mask")
        real = mask.sum() if torch.is_tensor(mask) and mask.shape == ids.shape else torch.tensor(rows * length)
        answers = (labels != IGNORE_INDEX).sum(1) if is_per_token else torch.zeros(rows, dtype=torch.long)
        # Heads that run on answers alone may pad them.
        answers = torch.stack([answers.sum(), rows * answers.max()])
        # Reading numbers off a device waits for it: only where a batch is looked at.
        if not self.is_compiled and self.samples.wants(shape):
            whole = shape + _labels(*answers.tolist())
            if not (is_typical and self.samples.explain(whole)):
                with FlopCounter() as counter:
                    yield
                if is_typical:
                    self.samples.add(whole, counter.flops)
                self._counted.add(Usage(counter.flops, int(real), rows * length - int(real)))
                return
        yield
        self._uncounted = self._uncounted + shape
        real = real.to(answers.device, torch.long)
        numbers = torch.cat([torch.stack([real, rows * length - real]), answers])
        self._numbers = numbers if self._numbers is None else self._numbers.to(numbers.device) + numbers

    @contextmanager
    def generation(self, ids: torch.Tensor, mask: torch.Tensor) -> Iterator[list[int]]:
        """While open, prompts `(B, T)` are continued; the number of new tokens per row goes into the yielded list."""
        new: list[int] = []
        is_counted = not self.is_compiled and self.samples.takes_more()
        with FlopCounter() if is_counted else nullcontext() as counter:
            yield new
        rows, length = ids.shape
        shape, real = _shape(rows, length, new[0]), int(mask.sum())
        self._counted.add(Usage(0.0, real + rows * new[0], rows * length - real))
        if counter is None:
            self._uncounted = self._uncounted + shape
        else:
            self.samples.add(shape, counter.flops)
            self._counted.flops += counter.flops

    def _read(self) -> np.ndarray:
        return np.zeros(2 + _OF_LABELS) if self._numbers is None else self._numbers.cpu().numpy()


def _shape(rows: int, length: int, other: int) -> np.ndarray:
    """What operations are linear in, without labels."""
    of_a_row = [1.0, length, length**2, other, other**2, length * other]
    return np.array([1.0, *(rows * value for value in of_a_row), *[0.0] * _OF_LABELS])


def _labels(*counts: float) -> np.ndarray:
    """What the labels of a batch add to its shape: their number, and the same with every row as long as the longest."""
    return np.array([*[0.0] * (_NUM_SHAPES - _OF_LABELS), *counts])
