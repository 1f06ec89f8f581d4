"""Seconds of work: wall time, but for trainings that take turns, each of which counts its own."""

import threading
import time
from collections.abc import Callable


class _Clock(threading.local):
    """Of the current thread; `None` for wall time."""

    own: Callable[[], float] | None = None


_clock = _Clock()


def work_seconds() -> float:
    """Seconds that the work of this thread has taken since some moment."""
    return time.perf_counter() if _clock.own is None else _clock.own()


def is_wall_time() -> bool:
    """Whether the seconds of this thread are those that pass."""
    return _clock.own is None


def count_by(clock: Callable[[], float]) -> None:
    """Let a clock say what the work of this thread has taken, from now on."""
    _clock.own = clock
