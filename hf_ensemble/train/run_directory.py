"""The directory of a run: what was configured, which stages are done."""

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._compat import package_versions
from .._files import named_differences, read_json, write_json
from ..errors import RunMismatchError
from ..logging import get_logger

logger = get_logger(__name__)

FORMAT_VERSION = 1
# What stands on the choice of groups or auxiliary tasks, and what the choice stands on.
_CHOICE_ARTEFACTS = ("groups.json", "selection.json", "evaluation.json", "results.json", "ensemble", "adapter")
_CHOICE_STAGES = ("group", "select", "weights", "adapter")
_BASIC_ARTEFACTS = ("gradients", "estimate", "baseline", "meta", "training", "scored_runs", "tasks.json", "run.json")


@dataclass
class RunDirectory:
    """Paths of a run's artefacts and the record of its stages in `run.json`.

    Args:
        path (`Path`): the run's `output_dir`.
        is_main_process (`bool`): whether this process writes.
        record (`dict`): what `run.json` holds.
    """

    path: Path
    is_main_process: bool = True
    record: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        path: str | Path,
        configuration: Mapping[str, Any],
        choices: Mapping[str, Any],
        overwrite: bool = False,
        is_main_process: bool = True,
    ) -> "RunDirectory":
        """Begin a run, or go on with the one of the same configuration that lies there.

        Args:
            path (`str` or `Path`): the run's `output_dir`.
            configuration (`dict`): what every stage depends on; with `overwrite`, a difference starts the run over.
            choices (`dict`):
                What only the choice of groups or tasks and the stages behind it depend on; with `overwrite`, a
                difference redoes these and keeps gradients and baseline.
            overwrite (`bool`, *optional*, defaults to `False`): whether differences may be overwritten.
            is_main_process (`bool`, *optional*, defaults to `True`): whether this process writes.

        Raises:
            `RunMismatchError`: when a run of another configuration lies there; the message names each difference.
        """
        run = cls(Path(path), is_main_process)
        wanted = {"configuration": dict(configuration), "choices": dict(choices)}
        stages: dict[str, Any] = {}
        if run.file.exists():
            run.record = read_json(run.file)
            basic, chosen = (list(named_differences(run.record[part], wanted[part])) for part in wanted)
            if not basic and not chosen:
                return run
            if not overwrite:
                raise RunMismatchError(
                    f"{str(path)!r} holds a run of another configuration: {'; '.join(basic + chosen)}. Choose another "
                    "output_dir, or set overwrite_run=True to redo the stages that depend on it."
                )
            run._delete(_CHOICE_ARTEFACTS if not basic else (*_CHOICE_ARTEFACTS, *_BASIC_ARTEFACTS))
            if not basic:
                kept = run.record["stages"].items()
                stages = {name: stage for name, stage in kept if name.split(":")[0] not in _CHOICE_STAGES}
        run.record = {
            "format": "hf_ensemble.run",
            "format_version": FORMAT_VERSION,
            **wanted,
            "versions": package_versions(),
            "stages": stages,
        }
        run._write()
        return run

    @property
    def file(self) -> Path:
        return self.path / "run.json"

    def _delete(self, names: Iterable[str]) -> None:
        """Delete artefacts of stages, and nothing else that lies there."""
        for name in names if self.is_main_process else ():
            target = self.path / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def is_done(self, stage: str) -> bool:
        return self.record["stages"].get(stage, {}).get("status") == "done"

    def seconds(self, stage: str) -> float | None:
        """Wall time of a finished stage; `None` where it was interrupted and taken up again."""
        return self.record["stages"].get(stage, {}).get("seconds")

    @contextmanager
    def stage(self, name: str) -> Iterator[bool]:
        """Yields whether the stage has to be run; it is recorded as done when the block ends without an exception."""
        if self.is_done(name):
            logger.info("Stage %r is done already.", name)
            yield False
            return
        interrupted = name in self.record["stages"]
        self.record["stages"][name] = {"status": "begun"}
        self._write()
        start = time.perf_counter()
        yield True
        seconds = None if interrupted else round(time.perf_counter() - start, 3)
        self.record["stages"][name] = {"status": "done", "seconds": seconds}
        self._write()

    def _write(self) -> None:
        if self.is_main_process:
            write_json(self.file, self.record)
