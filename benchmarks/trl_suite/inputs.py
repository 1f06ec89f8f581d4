"""Writes the local stand-ins for everything that trl's tests of `SFTTrainer` load from the Hub."""

import json
from pathlib import Path

import datasets
import transformers

from .models import write_models
from .rows import write_datasets

NAMES = "names.json"


def write_inputs(folder: Path) -> None:
    """Write `folder/datasets`, `folder/hub` (laid out as the Hub's cache) and the list of their names."""
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    names = [*write_datasets(folder / "datasets"), *write_models(folder / "hub")]
    (folder / NAMES).write_text(json.dumps(names, indent=1))
