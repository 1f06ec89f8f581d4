"""The directory of a run: what was configured, which stages are done."""

import shutil
import time
from collections.abc import Iterator, Mapping
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
_STAGE_ARTEFACTS = (
    "gradients",
    "estimate",
    "baseline",
    "meta",
    "training",
    "fidelity",
    "ensemble",
    "adapter",
    "tasks.json",
    "groups.json",
    "selection.json",
    "evaluation.json",
    "run.json",
)


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
        cls, path: str | Path, configuration: Mapping[str, Any], overwrite: bool = False, is_main_process: bool = True
    ) -> "RunDirectory":
        """Begin a run, or go on with the one of the same configuration that lies there.

        Raises:
            `RunMismatchError`: when a run of another configuration lies there; the message names each difference.
        """
        run = cls(Path(path), is_main_process)
        if run.file.exists():
            run.record = read_json(run.file)
            differences = list(named_differences(run.record["configuration"], dict(configuration)))
            if not differences:
                return run
            if not overwrite:
                raise RunMismatchError(
                    f"{str(path)!r} holds a run of another configuration: {'; '.join(differences)}. Choose another "
                    "output_dir, or set overwrite_run=True to start over."
                )
            run.clear()
        run.record = {
            "format": "hf_ensemble.run",
            "format_version": FORMAT_VERSION,
            "configuration": dict(configuration),
            "versions": package_versions(),
            "stages": {},
        }
        run._write()
        return run

    @property
    def file(self) -> Path:
        return self.path / "run.json"

    def clear(self) -> None:
        """Delete the artefacts of all stages, and nothing else."""
        if not self.is_main_process:
            return
        for name in _STAGE_ARTEFACTS:
            target = self.path / name
            if target.is_dir():
                shutil.rmtree(target)
            elif target.exists():
                target.unlink()

    def is_done(self, stage: str) -> bool:
        return self.record["stages"].get(stage, {}).get("status") == "done"

    def seconds(self, stage: str) -> float | None:
        return self.record["stages"].get(stage, {}).get("seconds")

    @contextmanager
    def stage(self, name: str) -> Iterator[bool]:
        """Yields whether the stage has to be run; it is recorded as done when the block ends without an exception."""
        if self.is_done(name):
            logger.info("Stage %r is done already.", name)
            yield False
            return
        start = time.perf_counter()
        yield True
        self.record["stages"][name] = {"status": "done", "seconds": round(time.perf_counter() - start, 3)}
        self._write()

    def _write(self) -> None:
        if self.is_main_process:
            write_json(self.file, self.record)
