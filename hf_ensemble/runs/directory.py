"""The directory of a run: which stages are done, and who may work in it."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any, Protocol

from .._cards import CARD
from .._compat import package_versions
from .._files import named_differences, remove_leftovers
from .._processes import run_on_main
from .._records import Record
from ..errors import RunLockedError, RunMismatchError
from ..logging import get_logger
from . import layout
from .costs import StageCost, measured_cost
from .files import RunFiles
from .lock import exclusive_record, exclusive_run, exclusive_stage, holder_of
from .records import RunRecord, StageRecord

logger = get_logger(__name__)

# Fingerprints of weights, some of which a script may draw at random.
_WEIGHTS = ("model.theta0:", "model.base_weights:")
_UNSEEDED = (
    "If the model is meant to be the same: without a seed, an adapter of get_peft_model and a new classification head "
    "are drawn anew each time a script is started. Call transformers.set_seed before they are made, or give the "
    "trainer the model's name and peft_config."
)


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
            `RunLockedError`: with `overwrite`, when other processes work on stages of the run that lies there.
            `RecordError`: when the run's record is damaged.
        """
        run = cls(path)
        # The others take what the main process has found or begun.
        run._record = run_on_main(lambda: run._opened(dict(configuration), dict(choices), overwrite))
        return run

    def _opened(self, configuration: dict[str, Any], choices: dict[str, Any], overwrite: bool) -> RunRecord:
        with exclusive_record(self.path):
            return self._begun(configuration, choices, overwrite)

    def _begun(self, configuration: dict[str, Any], choices: dict[str, Any], overwrite: bool) -> RunRecord:
        stages: dict[str, StageRecord] = {}
        if self.has(RunRecord):
            found = self.read(RunRecord)
            before, after = _without_capture(found.configuration), _without_capture(configuration)
            basic, captured = (list(named_differences(*pair)) for pair in zip(before, after))
            chosen = list(named_differences(found.choices, choices))
            if not basic and not captured and not chosen:
                return found
            if not overwrite:
                named = "; ".join([*basic, *captured, *chosen])
                raise RunMismatchError(
                    f"{str(self.path)!r} holds a run of another configuration: {named}. Choose "
                    "another output_dir, or set overwrite_run=True to redo the stages that depend on it.",
                    python=_UNSEEDED if any(name.startswith(_WEIGHTS) for name in basic) else None,
                )
            if self.holders():
                named = ", ".join(f"{name} ({holder})" for name, holder in self.holders().items())
                raise RunLockedError(
                    f"The run in {str(self.path)!r} cannot be started over while other processes work in it: {named}. "
                    "Stop them, or choose another output_dir."
                )
            gone, again = layout.CHOICE_ARTEFACTS, layout.CHOICE_STAGES
            if basic or captured:
                gone, again = (*gone, *layout.CAPTURE_ARTEFACTS), (*again, *layout.CAPTURE_STAGES)
            self._delete((*gone, *layout.BASIC_ARTEFACTS) if basic else gone)
            if not basic:
                kept = found.stages.items()
                stages = {name: stage for name, stage in kept if name.split(":")[0] not in again}
        record = RunRecord(configuration, choices, package_versions(), stages)
        self.write(record)
        return record

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While open, no other process can work in the run as a whole; temporary files of killed ones are removed.

        Raises:
            `RunLockedError`: when another process works in it.
        """
        with ExitStack() as stack:
            run_on_main(lambda: self._lock(stack))
            yield

    @contextmanager
    def stage_locked(self, name: str) -> Iterator[None]:
        """While open, no other process can work on this stage; others can work on other stages.

        What other processes have recorded until then is known.

        Raises:
            `RunLockedError`: when another process works on it.
        """
        with ExitStack() as stack:
            run_on_main(lambda: self._lock_stage(stack, name))
            self.refresh()
            yield

    def _lock_stage(self, stack: ExitStack, name: str) -> None:
        # A process that opens the whole run sees the lock before it removes what killed ones have left.
        with exclusive_record(self.path):
            stack.enter_context(exclusive_stage(self.stage_lock(name), self.path, name))

    def refresh(self) -> None:
        """Take up what other processes have recorded of their stages."""
        self._record = run_on_main(self._current)

    def _current(self) -> RunRecord:
        found = self.read(RunRecord)
        if found.identity(with_choices=True) != self.record.identity(with_choices=True):
            raise RunMismatchError(
                f"Another process has started the run in {str(self.path)!r} over with another configuration. Start "
                "this one again with that configuration, or choose another output_dir."
            )
        return found

    def write_shared(self, record: Record) -> None:
        """Write a record that every process writes which works in the run; on the main process."""
        with exclusive_record(self.path):
            self.write(record)

    def holders(self) -> dict[str, str]:
        """Which processes work on stages of the run, by stage as its lock names it."""
        found = {lock.name: holder_of(lock) for lock in sorted((self.path / layout.LOCKS).glob("*"))}
        return {name: holder for name, holder in found.items() if holder is not None}

    def _lock(self, stack: ExitStack) -> None:
        stack.enter_context(exclusive_run(self.path))
        with exclusive_record(self.path):
            if not self.holders():
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
        with self.stage_locked(name):
            if self.is_done(name) and run_on_main(lambda: all(self.has(kind) for kind in kinds)):
                logger.info("Stage %r is done already.", name)
                if self.listener is not None:
                    self.listener.passed(name)
                yield False
                return
            is_resumed = name in self.record.stages
            # What parts of it took that are there is kept.
            self._begin_stage(name, lambda known: StageRecord("begun", _cost_of_begun(known)))
            begun = None if self.listener is None else self.listener.begin(name)
            with measured_cost() as meter:
                yield True
            if begun is not None and is_resumed:
                # The time of what was made before is not known.
                self.listener.passed(name)
            elif begun is not None:
                self.listener.end(name, begun)
            self._record_stage(
                name, lambda known: StageRecord("done", _total(_cost_of_begun(known), meter.cost), is_resumed)
            )

    @contextmanager
    def part_of_stage(self, name: str, shard: tuple[int, int], is_whole: Callable[[], bool]) -> Iterator[bool]:
        """Yields whether a part of a stage has to be run, which other processes run other parts of at the same time.

        Costs of the parts add up. There is no wall time of the stage.

        Args:
            name (`str`): name of the stage.
            shard (`tuple[int, int]`): index and number of the parts.
            is_whole (`Callable`): whether all parts are there; called when this one has ended.

        Raises:
            `RunLockedError`: when another process runs the same part, the whole stage, or a part of another number.
        """
        index, count = shard
        with self.stage_locked(f"{name}:{index}-of-{count}"):
            if self.is_done(name):
                yield False
                return
            self._begin_stage(name, lambda known: known or StageRecord("begun", is_resumed=True), count)
            with measured_cost() as meter:
                yield True
            whole = run_on_main(is_whole)

            def added(known: StageRecord | None) -> StageRecord:
                before = known or StageRecord("begun")
                status = "done" if whole else before.status
                return StageRecord(status, _total(before.cost, meter.cost), is_resumed=True)

            self._record_stage(name, added)

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

        def repeated(known: StageRecord | None) -> StageRecord:
            return StageRecord("done", _total(known.cost if adds_up and known else None, meter.cost))

        self._record_stage(name, repeated)

    def _begin_stage(
        self, name: str, change: Callable[[StageRecord | None], StageRecord], count: int | None = None
    ) -> None:
        """[`_record_stage`] where no other process works on the same files: `count` is the number of parts."""

        def begun() -> RunRecord:
            # Each looks for the others with its own lock held.
            with exclusive_record(self.path):
                self._check_parts(name, count)
                return self._recorded(name, change)

        self._record = run_on_main(begun)

    def _check_parts(self, name: str, count: int | None) -> None:
        whole = self.stage_lock(name)
        others = sorted(whole.parent.glob(f"{escape(whole.name)}-*-of-*"))
        if count is not None:
            others = [whole, *(lock for lock in others if not lock.name.endswith(f"-of-{count}"))]
        for lock in others:
            if (holder := holder_of(lock)) is not None:
                own = name if count is None else f"one of {count} parts of {name}"
                raise RunLockedError(
                    f"Another process works in the run in {str(self.path)!r}, on {lock.name}: {holder}; {own} has some "
                    "of the same rows. Wait for it to finish, stop it, or give all parts one count."
                )

    def _record_stage(self, name: str, change: Callable[[StageRecord | None], StageRecord]) -> None:
        """Change what is known of a stage, beside what other processes record of theirs."""
        self._record = run_on_main(lambda: self._recorded(name, change))

    def _recorded(self, name: str, change: Callable[[StageRecord | None], StageRecord]) -> RunRecord:
        with exclusive_record(self.path):
            found = self._current()
            record = replace(found, stages={**found.stages, name: change(found.stages.get(name))})
            self.write(record)
        return record


def _cost_of_begun(known: StageRecord | None) -> StageCost | None:
    """What a stage has taken that was begun and is not done."""
    return None if known is None or known.status == "done" else known.cost


def _total(before: StageCost | None, more: StageCost) -> StageCost:
    return more if before is None else before + more


def _remove(path: Path) -> None:
    """Delete a file, or a folder and all that it holds; a link alone where it is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _without_capture(configuration: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """What trainings depend on, and what gradients alone do."""
    trained = dict(configuration)
    return trained, trained.pop("capture", {})
