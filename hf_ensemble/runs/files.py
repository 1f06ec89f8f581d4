"""Where everything of a run lies: its folders, and its records."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from .._processes import is_main_process
from .._records import Record
from .._settings import checked_path
from ..ensemble.saving.ensemble_config import ADAPTERS_FOLDER
from . import layout
from .records import RunRecord, ScoredRun, TrainedAdapter

R = TypeVar("R", bound=Record)


class RunFiles:
    """Folders and records of a run.

    Records are read with `read(Kind)` and written with `write(record)`; where they lie is known here alone.

    Args:
        path (`str` or `Path`): the run's `output_dir`.

    Attributes:
        record (`RunRecord`): configuration and stages.
    """

    def __init__(self, path: str | Path):
        self.path = checked_path("the folder of the run", path)
        self._record: RunRecord | None = None

    @property
    def record(self) -> RunRecord:
        if self._record is None:
            self._record = self.read(RunRecord)
        return self._record

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
    def start(self) -> Path:
        """The values that the adapter begins at."""
        return self.path / layout.START

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
    def comparison_table(self) -> Path:
        """The table of a comparison with simpler systems, in Markdown."""
        return self.path / layout.COMPARISON_TABLE

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

    def stage_lock(self, stage: str) -> Path:
        """The lock of a stage."""
        return self.path / layout.LOCKS / stage.replace(":", "-")

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

    def order_trainings(self, names: Sequence[str]) -> None:
        """Let trainings count their steps one after the other, where processes have made them at the same time.

        Args:
            names (`Sequence[str]`): the trainings in their order; those that the run does not hold are passed over.
        """
        known = [own for own in map(self.trained_adapter, names) if own is not None and own.status == "done"]
        if all(after.first_step >= own.first_step + own.global_step for own, after in pairwise(known)):
            return
        step = 0
        for own in known:
            self.write_trained_adapter(replace(own, first_step=step))
            step += own.global_step

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
        return self.record.identity(kind in layout.CHOICE_RECORDS, kind not in layout.TRAINED_RECORDS)

    def _training_record(self, name: str) -> Path:
        return self.path / layout.TRAINING / f"{name}.json"

    def _scored_run(self, mixture: Mapping[str, float] | Sequence[str], seed: int, theta0: str, length: float) -> Path:
        return self.path / layout.SCORED_RUNS / f"{_digest(mixture, theta0, length)}-seed{seed}.json"


def _digest(mixture: Mapping[str, float] | Sequence[str], *beginning: object) -> str:
    """What a training on a mixture is known by."""
    weights = mixture if isinstance(mixture, Mapping) else dict.fromkeys(mixture, 1.0)
    names = [name if weight == 1 else f"{name}*{weight!r}" for name, weight in weights.items() if weight]
    return hashlib.blake2b("|".join([*sorted(names), *map(str, beginning)]).encode(), digest_size=8).hexdigest()
