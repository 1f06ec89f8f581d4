"""Several processes: the artefacts of one, equal choices on every rank, and one rank's error ends all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from helpers import toy
from helpers.deepspeed import needs_deepspeed
from helpers.processes import run_python, run_ranks
from hf_ensemble.store.locks import exclusive_writers

CAPTURE = """
import sys
from accelerate import PartialState
from helpers import toy
from hf_ensemble import CaptureConfig, TaskSet, capture_gradients
from hf_ensemble.capture import capture
PartialState(cpu=True)
capture.SHARD_SIZE = 10
tasks = TaskSet.from_datasets(toy.sft_tasks(train=17))
config = CaptureConfig(projection_dim=32, batch_size=3)
options = {"processing_class": toy.tokenizer(), "disable_tqdm": True}
model = toy.with_lora(toy.llama())
capture_gradients(model, tasks, config, sys.argv[1], **options)
for shard in ("1/2", "0/2"):
    store = capture_gradients(model, tasks, config, f"{sys.argv[1]}-in-parts", shard=shard, **options)
    assert (store is None) == (shard == "1/2")
"""
# Uneven tasks, one of fewer rows than there are processes.
ROWS = """
import json, sys
from helpers import toy
from helpers.trainers import sft_config, split, text_trainer, without_speed
from hf_ensemble import *
from hf_ensemble.models import answer_head
from hf_ensemble.models.sharding import is_sharded

folder, base, encoder = sys.argv[1:4]

def rows(make, sizes):
    return {
        name: {"train": make(name, train, 1), "validation": make(name, count, 2)}
        for name, (train, count) in sizes.items()
    }

sizes = {"a": (17, 17), "b": (5, 3), "c": (17, 11)}
prompts = rows(lambda name, count, seed: toy.sum_rows(count, seed, "diff" if name == "b" else "sum"), sizes)
texts = rows(lambda name, count, seed: toy.text_rows(count, seed, "book" if name == "b" else "film"), sizes)
changes = {"num_train_epochs": 1, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4}
if "fsdp" in sys.argv or "deepspeed" in sys.argv:
    zero = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 3}}
    changes |= {"fsdp": True} if "fsdp" in sys.argv else {"deepspeed": zero}
    # As with a large vocabulary: how often the head runs depends on the rows.
    answer_head.LOGITS_BYTES = 1
sft = {"train_dataset": prompts, "peft_config": toy.lora(), "model": base}
sft["answer_metrics"] = {"a": {"extract": "last_number", "max_new_tokens": 3}}
trainer = EnsembleSFTTrainer(args=sft_config(f"{folder}/sft", num_groups=2, **changes), **sft)
"""
FAILING = """
from hf_ensemble.models.answer_scorer import AnswerScorer
score = AnswerScorer.__call__
def failing(self, *args, **kwargs):
    if trainer.args.process_index == 1:
        raise ValueError("no such luck on rank 1")
    return score(self, *args, **kwargs)
AnswerScorer.__call__ = failing
trainer.train()
"""
HANGING = """
import fcntl, os, subprocess, sys, time
held = open(f"{sys.argv[1]}/{os.environ['RANK']}", "w")
fcntl.flock(held, fcntl.LOCK_EX)
# Held until both have ended.
subprocess.Popen(["sleep", "60"], pass_fds=[held.fileno()])
time.sleep(60)
"""
# All four trainers.
TRAIN = """
def report(name, trainer):
    # Times are each process's own.
    metrics = without_speed(trainer.train().metrics)
    assert is_sharded(trainer.model) == bool({"fsdp", "deepspeed"} & set(sys.argv))
    # None is left that would communicate in a backward pass of one's own.
    assert not any(own._post_accumulate_grad_hooks for own in trainer.model.parameters())
    ensemble = getattr(trainer, "ensemble", None)
    if name == "ensemble_sft":
        asked = {task: own["validation"] for task, own in prompts.items()}
        metrics |= without_speed(trainer.predict(asked).metrics)
    chosen = trainer.grouping.groups if ensemble else trainer.selection.tasks
    with open(f"{folder}/{name}-{trainer.args.process_index}.json", "w") as file:
        json.dump({"metrics": metrics, "chosen": chosen, "weights": ensemble.weights if ensemble else {}}, file)

report("ensemble_sft", trainer)
report("selection_sft", SelectionSFTTrainer(
    args=sft_config(f"{folder}/sel", SelectionSFTConfig, **changes), target="a", **sft))
text = lambda name, *rest, **more: text_trainer(f"{folder}/{name}", encoder, texts, *rest, **changes, **more)
report("ensemble", text("text"))
report("selection", text("textsel", SelectionTrainer, SelectionConfig, target="a"))
trainer.accelerator.end_training()
"""
TRAINERS = ["ensemble_sft", "selection_sft", "ensemble", "selection"]
# One model on uneven tasks, whose losses are averaged over tasks.
BALANCED = """
import json, sys
from datasets import Dataset
from helpers import toy
from helpers.trainers import sft_config
from hf_ensemble import EnsembleSFTTrainer

folder, batch_size = sys.argv[1], int(sys.argv[2])
changes = {
    "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 2, "num_train_epochs": 2, "optim": "sgd",
    "learning_rate": 0.1, "logging_strategy": "steps", "logging_steps": 2, "task_sampling": "uniform",
    "task_loss_weighting": "convergence", "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
    "save_steps": 4, "coba_window": 2,
}
# Three steps an epoch, without a rest that several processes would fill up.
words = {"a": (8, "sum"), "b": (20, "diff"), "c": (12, "sum")}
rows = {name: toy.sum_rows(count, 1, word) for name, (count, word) in words.items()}
found = []
for resumed in (None, f"{folder}/checkpoint-4"):
    trainer = EnsembleSFTTrainer(
        model=toy.llama(),
        args=sft_config(folder, **changes),
        train_dataset=rows,
        eval_dataset={name: Dataset.from_list(toy.sum_rows(4, 2, word)) for name, (_, word) in words.items()},
        processing_class=toy.tokenizer(),
    )
    trainer.train(resume_from_checkpoint=resumed)
    found.append([
        {key: value for key, value in entry.items() if key.startswith("loss")} for entry in trainer.state.log_history
        if "loss" in entry
    ])
if trainer.is_world_process_zero():
    with open(f"{folder}/found.json", "w") as file:
        json.dump(found, file)
trainer.accelerator.end_training()
"""

STREAMED = """
import json, sys
from datasets import Dataset
from helpers import toy
from helpers.trainers import sft_config
from hf_ensemble import EnsembleSFTTrainer

folder, batch_size = sys.argv[1], int(sys.argv[2])
changes = {"per_device_train_batch_size": batch_size, "max_steps": 6, "optim": "sgd", "learning_rate": 0.1}
changes |= {"logging_strategy": "steps", "logging_steps": 1, "streaming_rows": 8}
rows = {name: Dataset.from_list(toy.sum_rows(40, seed)) for seed, name in enumerate("abc")}
trainer = EnsembleSFTTrainer(
    model=toy.llama(),
    args=sft_config(folder, **changes),
    train_dataset={name: own if name == "a" else own.to_iterable_dataset() for name, own in rows.items()},
    processing_class=toy.tokenizer(),
)
trainer.train()
if trainer.is_world_process_zero():
    with open(f"{folder}/found.json", "w") as file:
        json.dump([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], file)
trainer.accelerator.end_training()
"""


def launch(code: str, processes: int, *arguments: str) -> str:
    """Run `code` as every rank; all have to end well. Returns what they printed."""
    ranks = run_ranks(code, processes, *arguments) if processes > 1 else [run_python(code, *arguments)]
    printed = "".join(rank.stdout[-3000:] + rank.stderr[-3000:] for rank in ranks)
    assert all(rank.returncode == 0 for rank in ranks), printed
    return printed


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Launches all four trainers, once for each number of processes."""
    home, done = tmp_path_factory.mktemp("distributed"), set()
    base = toy.save_model(toy.llama(), home / "base")
    encoder = toy.save_model(toy.bert(2).bert, home / "encoder")

    def run(processes, *options):
        folder = home / "-".join([str(processes), *options])
        if folder not in done:
            folder.mkdir()
            launch(ROWS + TRAIN, processes, str(folder), base, encoder, *options)
            done.add(folder)
        return folder

    return run


def reports_of(train, processes, *options):
    folder = train(processes, *options)
    return folder, {
        name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(processes)]
        for name in TRAINERS
    }


def found_by_one_and_two(code, tmp_path, monkeypatch):
    """What a script writes into `found.json`: run by one process, and by two with half the rows of a batch each."""
    launch(code, 2, str(tmp_path / "2"), "2")
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / "1"), "4"])
    exec(compile(code, "<code>", "exec"), {})
    return [json.loads((tmp_path / processes / "found.json").read_text()) for processes in ("1", "2")]


def test_torchrun_writes_the_store_of_one_process(tmp_path):
    script = tmp_path / "capture.py"
    script.write_text(CAPTURE)
    launch(CAPTURE, 1, str(tmp_path / "one"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command += [str(script), str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    one, *others = (
        {file.name: file.read_bytes() for file in (tmp_path / name).glob("shard*")}
        for name in ("one", "two", "one-in-parts", "two-in-parts")
    )
    assert len(one) == 21 and others == [one] * 3


def test_what_the_main_process_finds_wrong_with_a_store_ends_all(tmp_path):
    with exclusive_writers([tmp_path / "store"]):
        ranks = run_ranks(CAPTURE, 2, str(tmp_path / "store"), timeout=60)
    assert all(rank.returncode == 1 and "Another capture is writing" in rank.stderr for rank in ranks)


@pytest.mark.slow
def test_two_processes_draw_weigh_and_log_as_one(tmp_path, monkeypatch):
    found = found_by_one_and_two(BALANCED, tmp_path, monkeypatch)
    for whole, resumed in found:
        assert whole == resumed and len(whole) > 2 and {"loss_a", "loss_b", "loss_c"} <= set(whole[0]) | set(whole[1])
    for one, two in zip(found[0][0], found[1][0]):
        assert one == pytest.approx(two, rel=1e-4)


@pytest.mark.slow
def test_two_processes_share_the_rows_of_streams(tmp_path, monkeypatch):
    one, two = found_by_one_and_two(STREAMED, tmp_path, monkeypatch)
    assert len(one) == 6 and one == pytest.approx(two, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_every_rank_makes_the_same_choices_and_they_are_those_of_one_process(train, processes):
    _, alone = reports_of(train, 1)
    folder, together = reports_of(train, processes)
    assert (folder / "sft" / "ensemble" / "README.md").is_file()
    for name in TRAINERS:
        own, (one,) = together[name], alone[name]
        assert all(report == own[0] for report in own[1:]), name
        assert set(own[0]["metrics"]) == set(one["metrics"])
        assert ("eval_a_exact_match" in one["metrics"]) == name.endswith("sft")
        # Larger batches over all processes, fewer steps: the losses are near, not equal.
        losses = [key for key in one["metrics"] if key.endswith("loss")]
        found, expected = ([report["metrics"][key] for key in losses] for report in (own[0], one))
        assert np.allclose(found, expected, rtol=0.15), name


@pytest.mark.slow
@pytest.mark.parametrize("by", ["fsdp", pytest.param("deepspeed", marks=needs_deepspeed)])
def test_over_a_sharded_base_runs_are_those_of_processes_that_share_rows(by, train):
    _, shared = reports_of(train, 2)
    _, sharded = reports_of(train, 2, by)
    for name in TRAINERS:
        (found, other), expected = sharded[name], shared[name][0]
        assert found == other, name
        assert found["chosen"] == expected["chosen"]
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
        for task, weights in expected["weights"].items():
            assert found["weights"][task] == pytest.approx(weights, abs=1e-4)


def test_an_error_on_one_rank_ends_all_with_that_error(tmp_path):
    base = toy.save_model(toy.llama(), tmp_path / "base")
    # None waits for another until it is stopped.
    ranks = run_ranks(ROWS + FAILING, 2, str(tmp_path), base, "", timeout=120)
    assert all(rank.returncode == 1 and "ValueError: no such luck on rank 1" in rank.stderr for rank in ranks)
    assert "Raised by process 1." in ranks[0].stderr


def test_ranks_that_hang_are_killed_with_what_they_have_started(tmp_path):
    with pytest.raises(subprocess.TimeoutExpired):
        run_ranks(HANGING, 2, str(tmp_path), timeout=1.5)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
    for rank in range(2):
        with FileLock(tmp_path / str(rank), timeout=10):
            pass
