"""Tests run on the CPU, without a network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import pytest
import torch
import transformers

from helpers import toy
from helpers.trainers import sft_trainer

datasets.disable_progress_bars()
transformers.logging.disable_progress_bar()


@pytest.fixture
def tokenizer():
    return toy.tokenizer()


@pytest.fixture
def base_folder(tmp_path):
    """A saved tiny Llama with its tokenizer."""
    return toy.save_model(toy.llama(), tmp_path / "base")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished ensemble run."""
    folder = tmp_path_factory.mktemp("finished")
    base = toy.save_model(toy.llama(), folder / "base")
    trainer = sft_trainer(folder / "run", base, num_groups=2)
    output = trainer.train()
    return trainer, output, base


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
