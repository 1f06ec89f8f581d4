"""The directory of a run: where everything lies, and which stages are done."""

import contextlib
import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .._cards import CARD
from .._compat import package_versions
from .._files import named_differences, remove_leftovers, write_atomically
from .._processes import is_main_process, run_on_main
from .._records import Record
from .._settings import checked_path
from ..ensemble.saving.ensemble_config import ADAPTERS_FOLDER
from ..errors import RunMismatchError
from ..logging import get_logger
from . import layout
from .costs import measured_cost
from .lock import exclusive_run
from .records import RunRecord, ScoredRun, StageRecord, TrainedAdapter

logger = get_logger(__name__)

R = TypeVar("R", bound=Record)


class StageListener(Protocol):
    """Is told of the stages of a run, parts of a stage by `NAME:PART`."""

    def begin(self, name: str) -> float: ...

    def end(self, name: str, begun: float) -> None: ...

    def passed(self, name: str) -> None: ...


class RunDirectory:
    """Paths, records and stages of a run.

    Records are read with `read(Kind)` and written with `write(record)`; where they lie is known here alone.

    Args:
        path (`str` or `Path`): the run's `output_dir`.

    Attributes:
        record (`RunRecord`): configuration and stages; a run has to be opened first.
        listener (`StageListener`, *optional*): is told when stages begin and end.
    """

    def __init__(self, path: str | Path):
        self.path = checked_path("the folder of the run", path)
        self._record: RunRecord | None = None
        self.listener: StageListener | None = None

    # Folders

    @property
    def gradients(self) -> Path:
        """The gradient store, where trainings begin."""
        return self.path / layout.GRADIENTS

    @property
    def baseline_gradients(self) -> Path:
        """The gradient store at the adapter for all tasks, where groups go on from it."""
        return self.path / layout.BASELINE_GRADIENTS

    @property
    def baseline(self) -> Path:
        """The one adapter for all tasks."""
        return self.path / layout.BASELINE

    @property
    def meta_initialization(self) -> Path:
        """The adapter that a selection starts from, where it was trained on all tasks first."""
        return self.path / layout.META_INITIALIZATION

    @property
    def adapter(self) -> Path:
        """The final adapter of a selection."""
        return self.path / layout.ADAPTER

    @property
    def ensemble(self) -> Path:
        """What goes to the Hub."""
        return self.path / layout.ENSEMBLE

    def compared(self, name: str) -> Path:
        """An adapter that was made to compare the ensemble with."""
        return self.path / layout.COMPARED / name

    @property
    def report(self) -> Path:
        """The page that shows the run."""
        return self.path / layout.REPORT

    @property
    def fidelity_picture(self) -> Path:
        """Predicted against true losses."""
        return self.path / layout.FIDELITY_PICTURE

    def member(self, name: str) -> Path:
        """One adapter of the ensemble."""
        return self.ensemble / ADAPTERS_FOLDER / name

    def training(self, name: str) -> Path:
        """Checkpoints and logs of one training."""
        return self.path / layout.TRAINING / name

    def scored_adapter(self, mixture: Mapping[str, float] | Sequence[str], seed: int) -> Path:
        """An adapter that is trained for its scores."""
        return self.path / layout.SCORED_RUNS / f"{_digest(mixture)}-seed{seed}"

    # Records

    def where(self, kind: type[Record]) -> Path:
        """The file of a record that a run has one of."""
        return self.path / layout.RECORDS[kind]

    def has(self, kind: type[Record]) -> bool:
        return self.where(kind).is_file()

    def read(self, kind: type[R]) -> R:
        """A record of the run.

        Raises:
            `RecordError`: for a file that is missing, damaged, of another run, or of a newer release.
        """
        return kind.load(self.where(kind), self._identity(kind))

    def read_if_there(self, kind: type[R]) -> R | None:
        """A record of the run, if it has one; see [`read`]."""
        return self.read(kind) if self.has(kind) else None

    def write(self, record: Record) -> None:
        """Write a record, on the main process."""
        if is_main_process():
            record.save(self.where(type(record)), self._identity(type(record)))

    def trained_adapter(self, name: str) -> TrainedAdapter | None:
        """What is known of a training; `None` where it was not begun."""
        path = self._training_record(name)
        return TrainedAdapter.load(path, self._identity(TrainedAdapter)) if path.is_file() else None

    def trainings(self) -> list[TrainedAdapter]:
        """Every finished training of the run, in the order of their steps."""
        return sorted((own for own in self._known_trainings() if own.status == "done"), key=lambda own: own.first_step)

    def num_steps(self) -> int:
        """Optimizer steps of all trainings that the run has a record of."""
        return max((known.first_step + known.global_step for known in self._known_trainings()), default=0)

    def _known_trainings(self) -> list[TrainedAdapter]:
        return [TrainedAdapter.load(path) for path in (self.path / layout.TRAINING).glob("*.json")]

    def write_trained_adapter(self, trained: TrainedAdapter) -> None:
        if is_main_process():
            trained.save(self._training_record(trained.name), self._identity(TrainedAdapter))

    def forget_training(self, name: str) -> None:
        """Drop the record of a training, on the main process, where something else takes its adapter's place."""
        if is_main_process():
            self._training_record(name).unlink(missing_ok=True)

    def scored_run(
        self, mixture: Mapping[str, float] | Sequence[str], seed: int, theta0: str, length: float = 1.0
    ) -> ScoredRun | None:
        """The scores of a fine-tuning on a mixture or a subset, from theta0 on; `None` where it was not made."""
        path = self._scored_run(mixture, seed, theta0, length)
        return ScoredRun.load(path, self._identity(ScoredRun)) if path.is_file() else None

    def scored_runs(self) -> list[ScoredRun]:
        """Every true fine-tuning of the run."""
        files = sorted((self.path / layout.SCORED_RUNS).glob("*.json"))
        return [ScoredRun.load(path, self._identity(ScoredRun)) for path in files]

    def write_scored_run(self, scored: ScoredRun) -> None:
        if is_main_process():
            path = self._scored_run(scored.mixture, scored.seed, scored.theta0, scored.length)
            scored.save(path, self._identity(ScoredRun))

    def _identity(self, kind: type[Record]) -> str | None:
        """What the run's own records of a kind carry; `None` for the run's record itself and where there is none."""
        if kind is RunRecord or (self._record is None and not self.has(RunRecord)):
            return None
        return self.record.identity(with_choices=kind in layout.CHOICE_RECORDS)

    def _training_record(self, name: str) -> Path:
        return self.path / layout.TRAINING / f"{name}.json"

    def _scored_run(self, mixture: Mapping[str, float] | Sequence[str], seed: int, theta0: str, length: float) -> Path:
        return self.path / layout.SCORED_RUNS / f"{_digest(mixture, theta0, length)}-seed{seed}.json"

    # Stages

    @property
    def record(self) -> RunRecord:
        if self._record is None:
            self._record = self.read(RunRecord)
        return self._record

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

        Model cards stay: their generated part is written again, and the rest may be someone's own.
        """
        for name in names:
            target, card = self.path / name, None
            if target.is_dir():
                with contextlib.suppress(FileNotFoundError):
                    card = (target / CARD).read_bytes()
                shutil.rmtree(target)
                if card is not None:
                    write_atomically(target / CARD, lambda file, card=card: file.write(card))
            else:
                target.unlink(missing_ok=True)

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


def _digest(mixture: Mapping[str, float] | Sequence[str], *beginning: object) -> str:
    """What a training on a mixture is known by."""
    weights = mixture if isinstance(mixture, Mapping) else dict.fromkeys(mixture, 1.0)
    names = [name if weight == 1 else f"{name}*{weight!r}" for name, weight in weights.items() if weight]
    return hashlib.blake2b("|".join([*sorted(names), *map(str, beginning)]).encode(), digest_size=8).hexdigest()
