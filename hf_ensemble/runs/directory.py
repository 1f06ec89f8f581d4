"""The directory of a run: which stages are done, and who may work in it."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from .._cards import CARD
from .._compat import package_versions
from .._files import named_differences, remove_leftovers
from .._processes import run_on_main
from .._records import Record
from ..errors import RunMismatchError
from ..logging import get_logger
from . import layout
from .costs import measured_cost
from .files import RunFiles
from .lock import exclusive_run
from .records import RunRecord, StageRecord

logger = get_logger(__name__)


class StageListener(Protocol):
    """Is told of the stages of a run, parts of a stage by `NAME:PART`."""

    def begin(self, name: str) -> float: ...

    def end(self, name: str, begun: float) -> None: ...

    def passed(self, name: str) -> None: ...


class RunDirectory(RunFiles):
    """Folders, records and stages of a run.

    Args:
        path (`str` or `Path`): the run's `output_dir`.

    Attributes:
        record (`RunRecord`): configuration and stages; a run has to be opened first.
        listener (`StageListener`, *optional*): is told when stages begin and end.
    """

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.listener: StageListener | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        configuration: Mapping[str, Any],
        choices: Mapping[str, Any],
        overwrite: bool = False,
    ) -> "RunDirectory":
        """Begin a run, or go on with the one of the same configuration that lies there.

        Args:
            path (`str` or `Path`): the run's `output_dir`.
            configuration (`dict`): what every stage depends on; with `overwrite`, a difference starts the run over.
            choices (`dict`):
                What only the choice of groups or tasks and the stages after it depend on; with `overwrite`, a
                difference redoes these and keeps gradients and baseline.
            overwrite (`bool`, *optional*, defaults to `False`): whether differences may be overwritten.

        Raises:
            `RunMismatchError`: when a run of another configuration lies there; the message names each difference.
            `RecordError`: when the run's record is damaged.
        """
        run = cls(path)
        # The others take what the main process has found or begun.
        run._record = run_on_main(lambda: run._opened(dict(configuration), dict(choices), overwrite))
        return run

    def _opened(self, configuration: dict[str, Any], choices: dict[str, Any], overwrite: bool) -> RunRecord:
        stages: dict[str, StageRecord] = {}
        if self.has(RunRecord):
            found = self.read(RunRecord)
            basic = list(named_differences(found.configuration, configuration))
            chosen = list(named_differences(found.choices, choices))
            if not basic and not chosen:
                return found
            if not overwrite:
                raise RunMismatchError(
                    f"{str(self.path)!r} holds a run of another configuration: {'; '.join(basic + chosen)}. Choose "
                    "another output_dir, or set overwrite_run=True to redo the stages that depend on it."
                )
            self._delete(layout.CHOICE_ARTEFACTS if not basic else (*layout.CHOICE_ARTEFACTS, *layout.BASIC_ARTEFACTS))
            if not basic:
                kept = found.stages.items()
                stages = {name: stage for name, stage in kept if name.split(":")[0] not in layout.CHOICE_STAGES}
        record = RunRecord(configuration, choices, package_versions(), stages)
        self.write(record)
        return record

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While open, no other process can work in the run; temporary files of killed ones are removed.

        Raises:
            `RunLockedError`: when another process works in it.
        """
        with ExitStack() as stack:
            run_on_main(lambda: self._lock(stack))
            yield

    @contextmanager
    def training_locked(self, name: str) -> Iterator[None]:
        """While open, no other process can train this adapter alone; others can be trained beside it.

        Raises:
            `RunLockedError`: when another process trains it.
        """
        with ExitStack() as stack:
            folder = self.path / layout.TRAINING / f".{name}"
            run_on_main(lambda: stack.enter_context(exclusive_run(folder)) and None)
            yield

    def _lock(self, stack: ExitStack) -> None:
        stack.enter_context(exclusive_run(self.path))
        for folder in (self.path, *(self.path / name for name in layout.WRITTEN_FOLDERS)):
            remove_leftovers(folder)

    def _delete(self, names: Iterable[str]) -> None:
        """Delete artefacts of stages, and nothing else that lies there.

        Model cards stay where they are: their generated part is written again, and the rest may be someone's own.
        """
        for name in names:
            target = self.path / name
            if (target / CARD).is_file():
                for own in target.iterdir():
                    if own.name != CARD:
                        _remove(own)
            else:
                _remove(target)

    def is_done(self, stage: str) -> bool:
        known = self.record.stages.get(stage)
        return known is not None and known.status == "done"

    def seconds(self, stage: str) -> float | None:
        """Wall time of a finished stage; `None` where it was interrupted and resumed."""
        known = self.record.stages.get(stage)
        return None if known is None or known.cost is None or known.is_resumed else known.cost.seconds

    @contextmanager
    def stage(self, name: str, *kinds: type[Record]) -> Iterator[bool]:
        """Yields whether the stage has to be run; it is recorded as done when the block ends without an exception.

        Args:
            name (`str`): name of the stage.
            kinds (`type[Record]`): records that the stage writes; without one of them it is run again.
        """
        if self.is_done(name) and run_on_main(lambda: all(self.has(kind) for kind in kinds)):
            logger.info("Stage %r is done already.", name)
            if self.listener is not None:
                self.listener.passed(name)
            yield False
            return
        is_resumed = name in self.record.stages
        self._record_stage(name, StageRecord("begun"))
        begun = None if self.listener is None else self.listener.begin(name)
        with measured_cost() as meter:
            yield True
        if begun is not None and is_resumed:
            # The time of what was made before is not known.
            self.listener.passed(name)
        elif begun is not None:
            self.listener.end(name, begun)
        self._record_stage(name, StageRecord("done", meter.cost, is_resumed))

    @contextmanager
    def repeated(self, name: str, adds_up: bool = False) -> Iterator[None]:
        """While open, a stage is run that is run as often as it is asked for; its cost is recorded when it ends.

        Args:
            name (`str`): name of the stage.
            adds_up (`bool`, *optional*, defaults to `False`):
                Whether what was made before is kept, so that costs add up; else the last one's is kept.
        """
        with measured_cost() as meter:
            yield
        known = self.record.stages.get(name) if adds_up else None
        cost = meter.cost if known is None or known.cost is None else known.cost + meter.cost
        self._record_stage(name, StageRecord("done", cost))

    def _record_stage(self, name: str, stage: StageRecord) -> None:
        self._record = replace(self.record, stages={**self.record.stages, name: stage})
        self.write(self._record)


def _remove(path: Path) -> None:
    """Delete a file, or a folder and all that it holds; a link alone where it is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
