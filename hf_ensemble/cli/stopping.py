"""Commands that are stopped from outside, and the line that they end with."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

# After so long, the signal is sent again.
_SECONDS_OF_A_FINALIZER = 0.05


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """While open, SIGTERM raises [`Terminated`], so that files, locks and worker processes are let go of."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = os.getpid()

    def stop(number, frame):
        # The next one ends the process at once, and so does the first one in a worker that was forked from it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != own:
            os.kill(os.getpid(), signal.SIGTERM)
        raise Terminated

    def ignored(raised) -> None:
        # The signal came while Python ran a finalizer, whose exceptions it drops, as it does those of this hook.
        if isinstance(raised.exc_value, Terminated):
            signal.signal(signal.SIGTERM, stop)
            again = threading.Timer(_SECONDS_OF_A_FINALIZER, os.kill, (own, signal.SIGTERM))
            again.daemon = True
            again.start()
        else:
            hook(raised)

    hook, sys.unraisablehook = sys.unraisablehook, ignored
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = hook


def print_last_line(text: str) -> None:
    """Print to stderr, on a line of its own, below any progress bar that is still open."""
    for bar in list(getattr(tqdm, "_instances", ())):
        # A bar that is closed later would be drawn over the line.
        bar.close()
    print(text, file=sys.stderr, flush=True)
