"""Disks that are full, folders that cannot be written, and things in the way: one error that names the path."""

import errno
import os
import resource
import shutil
import tempfile

import pytest
import torch

from helpers import toy
from helpers.trainers import sft_trainer
from hf_ensemble._files import (
    remove_folder,
    remove_leftovers,
    write_folder_atomically,
    write_json,
    write_together,
    writing,
)
from hf_ensemble.ensemble.saving.files import save_adapter
from hf_ensemble.errors import HfEnsembleError, WriteError
from hf_ensemble.runs import RunDirectory
from hf_ensemble.store import exclusive_writers


def failing(number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


def test_a_folder_is_removed_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_text("1")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", failing(errno.EINTR))
        with pytest.raises(OSError):
            remove_folder(tmp_path / "adapter")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".adapter.")
    remove_leftovers(tmp_path)
    remove_folder(tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_with_need_and_room(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(
        WriteError, match=r"run\.json' cannot be written: No space left.*0\.3 MiB are needed, .* free\. Make"
    ):
        write_json(tmp_path / "run.json", ["x" * 300_000])
    assert not list(tmp_path.iterdir())
    assert issubclass(WriteError, OSError) and issubclass(WriteError, HfEnsembleError)


def test_files_that_belong_together_are_never_of_two_writings(tmp_path, monkeypatch):
    write_together(tmp_path / "adapter", {"weights": b"1", "config": b"1"})
    (tmp_path / "adapter" / "notes").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(errno.ENOSPC))
        with pytest.raises(WriteError, match="adapter/weights' cannot be written: No space left"):
            write_together(tmp_path / "adapter", {"weights": b"2", "config": b"2"})
    files = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    assert files == {"weights": b"1", "config": b"1", "notes": b""}
    # What a killed process left is gone with the next writing.
    (tmp_path / "adapter" / ".config.x.tmp").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing(errno.EACCES))
        with pytest.raises(WriteError, match="adapter/weights' cannot be written"):
            write_together(tmp_path / "adapter", {"weights": b"2", "config": b"2"})
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["notes", "weights"]
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="'.*file' is a file where a folder has to be"):
        write_together(tmp_path / "file", {"weights": b"2", "config": b"2"})


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch, number):
    monkeypatch.setattr(tempfile, "mkstemp", failing(number))
    monkeypatch.setattr(tempfile, "mkdtemp", failing(number))
    message = f"{os.strerror(number)}. Make '{tmp_path}' writable, or choose another directory"
    with pytest.raises(WriteError, match=message):
        write_json(tmp_path / "run.json", {})
    with pytest.raises(WriteError, match=message):
        write_folder_atomically(tmp_path / "adapter", lambda folder: None)


def test_what_is_in_the_way_is_named(tmp_path, base_folder):
    (tmp_path / "run.json").mkdir()
    with pytest.raises(WriteError, match=r"run\.json' is a folder where a file has to be\. Move it away"):
        write_json(tmp_path / "run.json", {})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match="file' is a file where a folder has to be"):
        write_json(tmp_path / "file" / "run.json", {})
    with pytest.raises(WriteError, match="file' is a file where a folder has to be"):
        sft_trainer(tmp_path / "file", base_folder).train()
    (tmp_path / "run" / ".run.lock").mkdir(parents=True)
    with (
        pytest.raises(WriteError, match=r"\.run\.lock' is a folder where a file"),
        RunDirectory(tmp_path / "run").locked(),
    ):
        pass
    (tmp_path / ".gradients.lock").mkdir()
    with pytest.raises(WriteError, match=r"\.gradients\.lock'"), exclusive_writers([tmp_path / "gradients"]):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_errors_of_other_files_pass(tmp_path):
    with pytest.raises(PermissionError), writing(tmp_path / "training" / "one"):
        raise PermissionError(errno.EACCES, "denied", "/somewhere/else")
    with pytest.raises(RuntimeError, match="shapes"), writing(tmp_path / "x"):
        raise RuntimeError("shapes differ")


@pytest.fixture
def little_room():
    """No file may grow beyond 8 KiB: the system refuses as on a full disk, whichever library writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("what", ["adapter", "checkpoint", "tokenizer"])
def test_what_other_libraries_write_is_named_too(tmp_path, little_room, what):
    model = toy.with_lora(toy.llama(), r=16)
    tokenizer = toy.tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(200)])

    def write():
        with writing(tmp_path / what):
            if what == "adapter":
                save_adapter(model, "default", tmp_path / what)
            elif what == "checkpoint":
                torch.save(model.state_dict(), tmp_path / what)
            else:
                tokenizer.save_pretrained(tmp_path / what)

    caught = None
    little_room()
    try:
        write()
    except Exception as error:
        caught = error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert isinstance(caught, WriteError) and f"{what}' cannot be written: " in str(caught), repr(caught)
    assert "Make room and start again" in str(caught)


def test_a_killed_writer_leaves_no_traces_in_an_ensemble(tmp_path):
    from hf_ensemble import PeftEnsembleModel

    (tmp_path / "saved" / "adapters" / ".default.x.tmp").mkdir(parents=True)
    (tmp_path / "saved" / ".ensemble_config.json.y.tmp").write_text("{")
    PeftEnsembleModel(toy.with_lora(toy.llama()), ["default"]).save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").rglob(".*"))
