"""Which stage of a run begins, and about how long the run will take."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tqdm.auto import tqdm

from ..._clock import work_seconds
from ..._processes import is_main_process
from ..._text import counted
from ...logging import get_logger
from ...runs import RunDirectory

logger = get_logger(__name__)

EVALUATION = "evaluation"
# Passes over a row: a backward costs about two forwards.
FORWARD, TRAINING = 1.0, 3.0


@dataclass
class Stage:
    """A part of a run that is announced.

    Args:
        name (`str`): as the run's record has it; parts of a stage are called `NAME:PART`.
        label (`str`): what people read.
        work (`float`): forward passes over a row, a backward counted as two of them; 0 for what takes little time.
        parts (`dict[str, float]`): work of each part, where it has several and they are known.
    """

    name: str
    label: str
    work: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    def work_of(self, part: str) -> float:
        """Work of a part, 0 where it is not known; of the whole stage without a part."""
        return self.parts.get(part, 0.0) if part else self.work


class StageAnnouncer:
    """Announces the stages of a run as they begin, with the time that is left.

    The time is estimated from the speed of the stages that this process has run before; without one it is not told.
    Stages that are done already are passed over.

    Args:
        stages (`Sequence[Stage]`): in their order.
        say (`Callable`): takes each announcement.
        clock (`Callable`, *optional*): seconds.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        say: Callable[[str], None],
        clock: Callable[[], float] = work_seconds,
    ):
        self.stages = list(stages)
        self._say = say
        self._clock = clock
        self._finished: set[str] = set()
        self._measured = [0.0, 0.0]

    def stage(self, name: str) -> Stage | None:
        """The stage of this name, or that it is a part of; `None` for a name that is not announced."""
        return next((own for own in self.stages if own.name == name.split(":")[0]), None)

    def begin(self, name: str) -> float:
        """Announce a stage or a part of it; returns the time, for [`end`]."""
        own, part = self.stage(name), name.partition(":")[2]
        if own is None:
            self._say(f"Next: {name.replace(':', ' ').replace('_', ' ')}")
            return self._clock()
        if part and own.name in self._finished and not own.parts:
            # Groups that are chosen again between two trainings.
            return self._clock()
        label = own.label
        if len(own.parts) > 1 and part in own.parts:
            label = f"{label} {part} ({list(own.parts).index(part) + 1} of {len(own.parts)})"
        left = self._seconds_left(own)
        told = "" if left is None else f", about {duration(left)} left"
        self._say(f"Stage {self.stages.index(own) + 1} of {len(self.stages)}: {label}{told}")
        return self._clock()

    def end(self, name: str, begun: float) -> None:
        """Take the speed of a stage or part that has just been run."""
        own = self.stage(name)
        work = 0.0 if own is None else own.work_of(name.partition(":")[2])
        if work:
            self._measured[0] += self._clock() - begun
            self._measured[1] += work
        self.passed(name)

    def passed(self, name: str) -> None:
        """A stage, or a part of one, is done."""
        self._finished.add(name)

    def _seconds_left(self, current: Stage) -> float | None:
        seconds, work = self._measured
        if not work:
            return None
        parts = {part: own for part, own in current.parts.items() if f"{current.name}:{part}" not in self._finished}
        later = self.stages[self.stages.index(current) + 1 :]
        left = sum(parts.values()) if current.parts else current.work
        return (left + sum(sum(own.parts.values()) or own.work for own in later)) * seconds / work


def duration(seconds: float) -> str:
    """A time in words, as coarse as an estimate is."""
    for unit, size in (("hour", 3600), ("minute", 60)):
        if seconds >= 1.5 * size or (unit == "minute" and seconds >= 55):
            count = max(round(seconds / size), 1)
            return counted(count, unit)
    count = max(round(seconds / 5) * 5, 5) if seconds > 7 else max(round(seconds), 1)
    return counted(count, "second")


def announce(text: str, with_bars: bool) -> None:
    """Tell people on the main process: above the progress bars where they are shown, else in the log."""
    if not is_main_process():
        return
    if with_bars:
        tqdm.write(text, file=sys.stderr)
    else:
        logger.info("%s", text)


@contextmanager
def announced(run: RunDirectory, stages: Sequence[Stage] | None, with_bars: bool) -> Iterator[None]:
    """While open, the stages of a run are announced; nothing is without stages."""
    if stages is not None:
        run.listener = StageAnnouncer(stages, lambda text: announce(text, with_bars))
    try:
        yield
    finally:
        run.listener = None


def begin_evaluation(run: RunDirectory) -> None:
    """Announce the evaluation that a run ends with."""
    if run.listener is not None:
        run.listener.begin(EVALUATION)
