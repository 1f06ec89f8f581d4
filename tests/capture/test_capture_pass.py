"""The pass itself: batches, memory, disk, kills, a second process, rows that cannot be captured."""

import logging
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from filelock import FileLock

from helpers import toy
from helpers.captures import capture, causal_batch, contents, relative_error
from hf_ensemble.capture import CaptureConfig, GradientExtractor
from hf_ensemble.errors import CaptureError, StoreError, StoreLockedError, StoreMismatchError
from hf_ensemble.models.batches import HalvingOnFullMemory, length_sorted_batches
from hf_ensemble.store import GradientStore


@pytest.mark.parametrize(("max_rows", "max_tokens"), [(3, None), (100, 40), (4, 30), (1, 5)])
def test_batches_hold_every_row_once_within_their_limits(max_rows, max_tokens):
    lengths = np.random.default_rng(0).integers(1, 25, 60).tolist()
    batches = length_sorted_batches(lengths, max_rows, max_tokens)
    assert sorted(position for batch in batches for position in batch) == list(range(60))
    for batch in batches:
        longest = max(lengths[position] for position in batch)
        assert len(batch) <= max_rows
        assert max_tokens is None or len(batch) * longest <= max_tokens or len(batch) == 1
    order = [lengths[position] for batch in batches for position in batch]
    assert order == sorted(order)
    # No batch could have taken the next one's first row.
    for batch, following in zip(batches, batches[1:]):
        size = (len(batch) + 1) * lengths[following[0]]
        assert len(batch) == max_rows or (max_tokens is not None and size > max_tokens)


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_no_process_exceeds_its_limits(processes):
    lengths = np.random.default_rng(0).integers(1, 60, 200).tolist()
    batches = length_sorted_batches(lengths, 4, 50, processes)
    assert sorted(position for batch in batches for position in batch) == list(range(200))
    for batch in batches:
        each, longest = -(-len(batch) // processes), max(lengths[position] for position in batch)
        assert each <= 4 and (each * longest <= 50 or each == 1)
    assert any(len(batch) == 4 * processes for batch in batches)
    # Rows above the limit are one process's each.
    assert length_sorted_batches([60] * 5, 4, 50, processes)[0] == list(range(min(processes, 5)))


def test_a_token_budget_changes_no_feature(tmp_path):
    plain = capture(tmp_path / "plain")
    packed = capture(tmp_path / "packed", batch_size=64, max_batch_tokens=50)
    found, expected = (torch.from_numpy(store.table("train").features[:]) for store in (packed, plain))
    assert relative_error(found, expected) < 1e-5
    # It is no other store, either: only how many go through the model at once differs.
    assert len(capture(tmp_path / "plain", max_batch_tokens=50)) == len(plain)


def test_full_memory_halves_the_batch_from_then_on(caplog):
    calls = []

    def function(rows):
        calls.append(len(rows))
        if len(rows) > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return list(rows)

    run = HalvingOnFullMemory(function, torch.nn.Identity())
    with caplog.at_level(logging.WARNING):
        assert [row for part in run(range(10)) for row in part] == list(range(10))
    assert calls == [10, 5, 3, 2, 3, 2] and "10 rows at once do not fit" in caplog.text
    calls.clear()
    assert [row for part in run(range(7)) for row in part] == list(range(7))
    assert calls == [3, 3, 1]


def test_other_errors_and_single_rows_are_not_swallowed():
    def fails(rows):
        raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"):
        HalvingOnFullMemory(fails, torch.nn.Identity())([1, 2])

    def too_large(rows):
        raise RuntimeError("CUDA out of memory.")

    with pytest.raises(RuntimeError, match="out of memory"):
        HalvingOnFullMemory(too_large, torch.nn.Identity())([1, 2])


def test_a_pass_that_runs_out_of_memory_ends_with_the_same_store(tmp_path, monkeypatch):
    plain = capture(tmp_path / "plain")
    whole = GradientExtractor.__call__

    def small(self, batch):
        if len(batch["input_ids"]) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return whole(self, batch)

    monkeypatch.setattr(GradientExtractor, "__call__", small)
    store = capture(tmp_path / "small")
    found, expected = (torch.from_numpy(own.table("train").features[:]) for own in (store, plain))
    assert relative_error(found, expected) < 1e-5


def test_a_disk_without_room_is_found_before_the_pass(tmp_path, monkeypatch, caplog):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(GradientExtractor, "__call__", lambda *a: pytest.fail("captured"))
    with pytest.raises(StoreError, match=r"needs another .* GiB, but only 0.0 GiB are free"):
        capture(tmp_path / "store")


def test_the_size_is_said_beforehand(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="hf_ensemble"):
        logging.getLogger("hf_ensemble").propagate = True
        capture(tmp_path / "store")
    assert "examples to capture into" in caplog.text and "MiB" in caplog.text


@pytest.mark.parametrize(
    ("held", "own"), [("", None), (".1-of-3", None), ("", (0, 3)), (".0-of-3", (0, 3)), (".0-of-2", (1, 3))]
)
def test_a_second_pass_into_one_directory_is_refused(tmp_path, held, own):
    with FileLock(tmp_path / f".store{held}.lock"), pytest.raises(StoreLockedError, match="Another capture is writing"):
        capture(tmp_path / "store", shard=own)
    assert len(capture(tmp_path / "store")) > 0


def test_parts_that_are_captured_side_by_side_make_the_store_of_one_pass(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_ensemble.capture.capture.SHARD_SIZE", 8)

    capture(tmp_path / "whole", preconditioner="adam")
    expected, folder = contents(tmp_path / "whole"), tmp_path / "store"
    settings = {"folder": folder, "preconditioner": "adam"}
    assert capture(**settings, shard=(2, 3)) is None
    # As a killed part leaves them, and one that writes still.
    (folder / "shard-00002.json").unlink()
    (folder / ".shard-00000.json.x.tmp").write_text("{")
    # Another part goes on beside it.
    with FileLock(tmp_path / ".store.0-of-3.lock"):
        assert capture(**settings, shard=(1, 3)) is None
    assert (folder / ".shard-00000.json.x.tmp").exists()
    assert capture(**settings, shard="0/3") is None
    with pytest.raises(StoreError, match="unfinished: it has 11 of 12 shards"):
        GradientStore(folder)
    assert len(capture(**settings, shard=(2, 3))) == 90
    assert contents(folder) == expected
    # There is nothing left to do for a part that is started once more, nor for one of another number of parts.
    assert len(capture(**settings, shard=(1, 3))) == len(capture(**settings, shard=(19, 20))) == 90
    assert contents(folder) == expected


def broken_model():
    """The word "diff" makes it answer NaN."""
    model = toy.with_lora(toy.llama())
    with torch.no_grad():
        model.get_input_embeddings().weight[toy.VOCABULARY.index("diff")] = float("nan")
    return model


def test_rows_that_are_not_finite_are_left_out_when_asked(tmp_path, caplog):
    rows = toy.sft_tasks(train=8, validation=4)
    # One good row, so that something of the task is left.
    for split in ("train", "validation"):
        rows["diffs"][split][0] = rows["sums"][split][0] | {"completion": " 7"}
    with caplog.at_level(logging.WARNING):
        store = capture(tmp_path / "store", broken_model(), rows, non_finite="exclude", preconditioner="none")
    assert len(store.excluded) == 10 and {task for _, task, _ in store.excluded} == {"diffs"}
    assert "10 examples with gradients that are not finite are excluded" in caplog.text and "diffs/" in caplog.text
    table = store.table("train")
    counts = dict(zip(table.task_names, np.bincount(table.task).tolist()))
    assert counts == {"sums": 8, "diffs": 1, "more_sums": 8} and store.num_rows("train") == 17
    assert np.isfinite(table.features).all()
    clean = capture(tmp_path / "clean", rows={"sums": rows["sums"]}, preconditioner="none")
    expected = clean.table("train")
    found = store.table("train", ["sums"])
    assert relative_error(torch.from_numpy(found.features[:]), torch.from_numpy(expected.features[:])) < 1e-5
    with pytest.raises(StoreMismatchError, match="config.non_finite"):
        capture(tmp_path / "store", broken_model(), rows)


def last_token_margin(logits, labels):
    """Of the last answer token alone."""
    last = (labels != -100).float().cumsum(-1).argmax(-1)
    rows = torch.arange(len(labels))
    log_prob = torch.log_softmax(logits[rows, last - 1].float(), -1)[rows, labels[rows, last]]
    return log_prob - torch.log1p(-log_prob.exp())


def test_a_user_s_own_output_function_is_captured_exactly(tmp_path):
    rows, collate = causal_batch("right")
    model = toy.with_lora(toy.llama())
    found = GradientExtractor(model, None, margin=last_token_margin)(collate(rows))
    parameters = [p for p in model.parameters() if p.requires_grad]
    for index, row in enumerate(rows):
        batch = collate([row])
        value = last_token_margin(model(input_ids=batch["input_ids"]).logits, batch["labels"])[0]
        gradients = torch.autograd.grad(value, parameters)
        expected = torch.cat([gradient.flatten() for gradient in gradients])
        assert relative_error(found.features[index], expected) < 1e-5
        assert float(found.margin[index]) == pytest.approx(value.item(), rel=1e-5)
    store = capture(tmp_path / "store", margin=last_token_margin)
    assert "last_token_margin" in store.identity["config"]["margin"]
    with pytest.raises(StoreMismatchError, match="config.margin"):
        capture(tmp_path / "store")


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda logits, labels: logits.sum(), r"shape \(\)"),
        (lambda logits, labels: labels[:, 0].float(), r"shape \(5,\)"),
        (lambda logits, labels: 1.0, "float"),
    ],
)
def test_an_output_function_of_another_form_is_refused(function, found):
    rows, collate = causal_batch("right")
    with pytest.raises(CaptureError, match=f"one number per example, of shape \\(5,\\); found {found}"):
        GradientExtractor(toy.with_lora(toy.llama()), 16, margin=function)(collate(rows))
    assert callable(CaptureConfig(margin=function).margin)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_killed_twenty_times_it_ends_with_the_same_store(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_ensemble.capture.capture.SHARD_SIZE", 8)
    rows = toy.sft_tasks(train=16, validation=8)
    model = toy.with_lora(toy.llama())
    start = time.perf_counter()
    whole = capture(tmp_path / "whole", model, rows)
    duration = time.perf_counter() - start
    generator = random.Random(0)
    killed = 0
    for attempt in range(20):
        child = os.fork()
        if child == 0:
            try:
                capture(tmp_path / "killed", model, rows)
            finally:
                os._exit(0)
        time.sleep(generator.uniform(0, 0.6 * duration))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        # Never mistaken for a finished one, unless it is.
        if os.WIFSIGNALED(status) and attempt % 5 == 0 and (tmp_path / "killed" / "manifest.json").exists():
            try:
                GradientStore(tmp_path / "killed")
            except StoreError as error:
                assert "unfinished" in str(error)
        if attempt % 4 == 3:
            resumed = capture(tmp_path / "killed", model, rows)
            for file in sorted((tmp_path / "whole").glob("shard-*")):
                assert (tmp_path / "killed" / file.name).read_bytes() == file.read_bytes(), file.name
            assert resumed.manifest == whole.manifest
            shutil.rmtree(tmp_path / "killed")
    assert killed >= 10


def test_a_sharded_model_is_refused():
    model = toy.with_lora(toy.llama())
    name, parameter = next((name, p) for name, p in model.named_parameters() if p.requires_grad)
    # What DeepSpeed marks the parameters with that it has shared out.
    parameter.ds_id = 0
    with pytest.raises(CaptureError, match=f"1 trainable parameters are sharded over devices, among them '{name}'"):
        GradientExtractor(model, 16)
