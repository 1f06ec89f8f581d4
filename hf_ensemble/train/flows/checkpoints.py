"""Checkpoints of a training that was interrupted, and whether they can be read."""

import json
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ...logging import get_logger

logger = get_logger(__name__)


def last_whole_checkpoint(work: Path) -> str | None:
    """The newest checkpoint of which every file reads; others are deleted."""
    steps = {int(path.name.split("-")[-1]): path for path in work.glob("checkpoint-*") if path.is_dir()}
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
    """Why a checkpoint cannot be resumed from; `None` for a whole one. The state is what `Trainer` writes last."""
    if not (checkpoint / "trainer_state.json").is_file():
        return "it was not written to its end"
    for path in checkpoint.rglob("*"):
        if path.is_file() and not _reads(path):
            return f"{path.name} is damaged"
    return None


def _reads(path: Path) -> bool:
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                file.keys()
        elif path.suffix in (".pt", ".pth"):
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
    except (ValueError, OSError, SafetensorError, zipfile.BadZipFile):
        return False
    return True
