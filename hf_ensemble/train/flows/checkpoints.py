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
    """The newest checkpoint whose files are as they were written; others are deleted."""
    steps = {int(path.name.split("-")[-1]): path for path in work.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()}
    whole = []
    for step, path in steps.items():
        fault = _fault(path)
        if fault is None:
            whole.append(step)
        else:
            logger.warning("The checkpoint %s is deleted, because %s.", path, fault)
            shutil.rmtree(path)
    return str(steps[max(whole)]) if whole else None


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
