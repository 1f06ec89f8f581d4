"""What a run's stages and systems cost."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from .._clock import work_seconds
from .._processes import run_on_all
from .._records import Record
from ..models.usage import measured_usage


@dataclass(frozen=True)
class StageCost:
    """What a stage took, all processes together.

    Of a stage that was killed and resumed, `flops`, `tokens` and `seconds` are of the work that its result rests on, as
    far as checkpoints have kept them: what was lost with the killed process is not among them.

    Args:
        seconds (`float`): wall time.
        flops (`float`): floating point operations of forward and backward passes, see [`FlopCounter`].
        tokens (`int`): tokens that were run through the model, padding apart; in every epoch anew.
        padding (`int`): tokens of padding that were computed beside them.
        peak_memory (`int`): bytes; the largest of all processes.
        memory_of (`str`):
            `"device"` for memory that the accelerator had allocated during the stage, `"process"` for the largest
            resident memory of the process until its end, where no accelerator was used.
    """

    seconds: float = 0.0
    flops: float = 0.0
    tokens: int = 0
    padding: int = 0
    peak_memory: int = 0
    memory_of: Literal["device", "process"] = "process"

    def __add__(self, other: "StageCost") -> "StageCost":
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("seconds", "flops", "tokens", "padding")}
        return replace(other, **sums, peak_memory=max(self.peak_memory, other.peak_memory))


@dataclass(frozen=True)
class SystemCost:
    """What a system costs to train, to keep and to run.

    Args:
        training_flops (`float`):
            Floating point operations of the trainings that its adapters come from, each once; of an ensemble, also of
            all its boosting steps, kept or not, with the scoring that each is chosen by.
        training_tokens (`int`): tokens of these trainings, padding apart; boosting steps without training have none.
        training_seconds (`float`): wall time of these trainings.
        trained_parameters (`int`): parameters of all these trainings.
        stored_parameters (`int`): numbers in the adapters' files.
        inference_flops (`float`, *optional*):
            Floating point operations of a forward pass for each token, mean over the rows that were scored.
        trainings (`list[str]`): names of the trainings.
    """

    training_flops: float = 0.0
    training_tokens: int = 0
    training_seconds: float = 0.0
    trained_parameters: int = 0
    stored_parameters: int = 0
    inference_flops: float | None = None
    trainings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Costs(Record):
    """Costs of every system that was evaluated; those of stages are in the run's record.

    Args:
        systems (`dict[str, SystemCost]`): by system.
    """

    format = "hf_ensemble.costs"

    systems: dict[str, SystemCost] = field(default_factory=dict)


def figure_with_prefix(value: float, unit: str = "") -> str:
    """A figure as tables show it, with the prefix of its thousands: `1.23 T`."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    while abs(value) >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    prefix = prefixes[0]
    digits = 0 if prefix == "" or abs(value) >= 99.95 else 2 if abs(value) < 9.995 else 1
    return f"{value:.{digits}f} {prefix}{unit}".rstrip()


# Largest device memory of each open measurement, up to where the counter was reset last. Those of trainings that take
# turns overlap.
_PEAKS: dict[object, int] = {}


class CostMeter:
    """Holds the cost of a stage when it has ended.

    Attributes:
        cost (`StageCost`, *optional*): the same on every process; there once [`measured_cost`] is closed.
    """

    cost: StageCost | None = None


@contextmanager
def measured_cost() -> Iterator[CostMeter]:
    """Measure what runs while open; every process has to get to the end.

    It resets torch's peak of allocated device memory: torch keeps one such counter for each device, and a smaller peak
    than an earlier one does not show without it. `torch.cuda.max_memory_allocated` then says what was the most since
    the last measurement began. Measurements within each other are right, each of its own.
    """
    meter, start = CostMeter(), work_seconds()
    with _device_peak() as peaks, measured_usage() as usage:
        yield meter
    seconds = work_seconds() - start + usage.seconds
    parts = run_on_all(lambda: (usage, peaks[-1], _peak_of_process()))
    # Keeping its random state initialises a device that a run on the CPU allocates nothing on.
    on_device = max(own for _, own, _ in parts)
    meter.cost = StageCost(
        seconds=round(seconds, 3),
        flops=float(sum(own.flops for own, *_ in parts)),
        tokens=sum(own.tokens for own, *_ in parts),
        padding=sum(own.padding for own, *_ in parts),
        peak_memory=on_device or max(own for *_, own in parts),
        memory_of="device" if on_device else "process",
    )


@contextmanager
def _device_peak() -> Iterator[list[int]]:
    """Yields a list that ends with the largest device memory, in bytes, when it is closed."""
    found, key = [], object()
    if torch.cuda.is_initialized():
        before = torch.cuda.max_memory_allocated()
        _PEAKS.update({own: max(peak, before) for own, peak in _PEAKS.items()})
        torch.cuda.reset_peak_memory_stats()
    _PEAKS[key] = 0
    try:
        yield found
    finally:
        own = _PEAKS.pop(key)
        found.append(max(own, torch.cuda.max_memory_allocated()) if torch.cuda.is_initialized() else own)


def _peak_of_process() -> int:
    try:
        import resource
    except ImportError:
        # Windows.
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import sys

    # In kilobytes, but for macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
