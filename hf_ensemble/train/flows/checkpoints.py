"""Checkpoints of a training that was interrupted, and whether they are as they were written."""

import shutil
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..._files import checksums, read_json, write_json
from ..._processes import is_main_process, wait_for_everyone
from ..._records import check_checksum, with_checksum
from ...errors import RecordError
from ...logging import get_logger
from ..resumed_training import best_checkpoint_of

logger = get_logger(__name__)

_SEAL = "checksums.json"


class SealCheckpoints(TrainerCallback):
    """Writes the checksums of every checkpoint's files into it, last of all."""

    def on_save(self, args, state, control, **kwargs):
        # Every process writes its own random state.
        wait_for_everyone()
        if is_main_process():
            seal_checkpoint(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def seal_checkpoint(checkpoint: Path) -> None:
    """Write the checksums of a checkpoint's files into it."""
    if checkpoint.is_dir():
        write_json(checkpoint / _SEAL, with_checksum({"files": checksums(checkpoint)}))


def last_whole_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that a training goes on from to the end it would have had; those that do not are deleted.

    Its files are as they were written, and so are those of the best checkpoint until then.
    """
    faults = {path: _fault(path) for path in checkpoints_in(work)}
    whole = {path for path, fault in faults.items() if fault is None}
    for path in whole:
        best = best_checkpoint_of(path)
        if best is not None and best not in whole:
            faults[path] = f"the best checkpoint until then, {best.name}, is damaged or gone"
    usable = [path for path, fault in faults.items() if fault is None]
    for path, fault in faults.items():
        if fault is not None:
            logger.warning("The checkpoint %s is deleted, because %s.", path, fault)
            shutil.rmtree(path)
    return str(max(usable, key=checkpoint_step)) if usable else None


def checkpoints_in(work: Path) -> list[Path]:
    """The checkpoints in a training's folder."""
    return [path for path in work.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]


def checkpoint_step(checkpoint: str | Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(Path(checkpoint).name.split("-")[-1])


def remove_checkpoints(work: Path) -> None:
    """Delete the checkpoints of a finished training; logs of trackers stay."""
    for checkpoint in checkpoints_in(work):
        shutil.rmtree(checkpoint, ignore_errors=True)
    if work.is_dir() and not any(work.iterdir()):
        work.rmdir()


def _fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; `None` for a whole one."""
    if not (checkpoint / _SEAL).is_file():
        return "it was not written to its end"
    try:
        seal = read_json(checkpoint / _SEAL)
        check_checksum(seal, _SEAL)
        written = seal["files"]
    except (OSError, RecordError, AttributeError, KeyError, TypeError):
        return f"{_SEAL} is damaged"
    found = checksums(checkpoint)
    altered = [name for name, checksum in written.items() if found.get(name) != checksum]
    return f"{altered[0]} is damaged" if altered else None
