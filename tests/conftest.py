"""Tests run on the CPU, without a network."""

import gc
import os
import threading
from functools import partial
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import pytest
import torch
import transformers
from tqdm import tqdm

from helpers import toy
from helpers.trainers import sft_trainer
from hf_ensemble.models.usage import FlopSamples
from hf_ensemble.train.concurrent import turns
from hf_ensemble.train.concurrent.shared_pass import SharedPass

if not torch.accelerator.is_available():
    # DeepSpeed says on stdout that it finds none when accelerate imports it, in whichever test that is.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
datasets.disable_progress_bars()
transformers.logging.disable_progress_bar()


def progress_bars_of_this_process() -> None:
    """A process that is killed while it holds the lock of progress bars stops those alone that share it.

    By default, a process shares it with all that it has forked.
    """
    tqdm.set_lock(threading.RLock())


progress_bars_of_this_process()
os.register_at_fork(after_in_child=progress_bars_of_this_process)


# What looks at the pictures of model cards; drawing them takes half a second a run.
_LOOKS_AT_PICTURES = {"publish", "cli", "project", "test_ensemble_trainer"}
# What looks at operations; counting those of the first batches takes a tenth of a run as small as these.
_LOOKS_AT_OPERATIONS = {"cli", "models", "project", "publish", "test_boosting", "test_comparison", "test_costs"}


@pytest.fixture(scope="module", autouse=True)
def only_what_is_looked_at(request):
    """Runs draw pictures for their model cards, and count the operations of batches, where tests look at them."""
    names = {request.path.parent.name, request.path.stem}
    with pytest.MonkeyPatch.context() as patch:
        if _LOOKS_AT_PICTURES.isdisjoint(names):
            patch.setattr("hf_ensemble.publish.card._draw_one", lambda draw, data: None)
        if _LOOKS_AT_OPERATIONS.isdisjoint(names):
            patch.setattr(FlopSamples, "wants", lambda self, shape: False)
            patch.setattr(FlopSamples, "takes_more", lambda self: False)
        yield


@pytest.fixture(scope="session", autouse=True)
def only_what_is_young_is_collected():
    """Accelerate collects garbage after every training, which takes longer than most of these trainings do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate.utils.memory.gc", SimpleNamespace(collect=partial(gc.collect, 1)))
        yield


@pytest.fixture(scope="module", autouse=True)
def nothing_old_is_collected(only_what_is_looked_at):
    """Collections do not look through all that is imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def tokenizer():
    return toy.tokenizer()


@pytest.fixture
def base_folder(tmp_path):
    """A saved tiny Llama with its tokenizer."""
    return toy.save_model(toy.llama(), tmp_path / "base")


@pytest.fixture
def two_processes(monkeypatch):
    """To the arguments of a run, it is made by two processes, which the launcher did not ask to shard the base."""
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.setenv(name, "false")
    monkeypatch.setattr("transformers.TrainingArguments.world_size", 2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished ensemble run."""
    folder = tmp_path_factory.mktemp("finished")
    base = toy.save_model(toy.llama(), folder / "base")
    trainer = sft_trainer(folder / "run", base, num_groups=2)
    output = trainer.train()
    return trainer, output, base


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    # A test that ran out of time may have been stopped where gradients were off.
    torch.set_grad_enabled(True)


def pytest_collection_modifyitems(items):
    # Files with long tests come first: workers end together where the last tests are short.
    long = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in long)
    if not torch.cuda.is_available():
        for item in items:
            # The keywords would also hold the names of the folders above.
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def uncounted(monkeypatch):
    """No batch's operations are counted, for which trainings run the first ones alone."""
    monkeypatch.setattr(FlopSamples, "wants", lambda self, shape: False)


@pytest.fixture
def passes(monkeypatch):
    """Number of trainings in each shared pass."""
    counts = []

    def counted(calls):
        counts.append(len(calls))
        return SharedPass(calls)

    monkeypatch.setattr(turns, "SharedPass", counted)
    return counts
