"""Wall time, memory and numbers of kernels on a device."""

import contextlib
import gc
import time
from collections.abc import Callable
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall time of a call, until the device has finished it."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Peak of the device's memory during a call, above what is allocated before; not known of a CPU."""
    if device.type != "cuda":
        run()
        return None
    gc.collect()
    torch.cuda.empty_cache()
    rest = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - rest


def kernels(run: Callable[[], Any], device: torch.device) -> int | None:
    """Number of kernels and copies that a call starts on a GPU, on a CPU of operations; `None` if it cannot be told."""
    is_cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if is_cuda else torch.profiler.ProfilerActivity.CPU
    # A machine may not let its counters be read.
    with contextlib.suppress(RuntimeError, AttributeError):
        with torch.profiler.profile(activities=[activity]) as profile:
            run()
            synchronize(device)
        wanted = torch.autograd.DeviceType.CUDA if is_cuda else torch.autograd.DeviceType.CPU
        found = [event for event in profile.events() if event.device_type == wanted and event.cpu_parent is None]
        return len(found) or None
    return None
