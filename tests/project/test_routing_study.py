"""The study of routers compares what it says, on the outputs of another study."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.budgets.train import PLAN, TARGETS
from benchmarks.routing import run as study
from benchmarks.routing.table import EQUAL, KNOWN, OTHERS, PROMPTS, ROUTED
from helpers import toy
from helpers.task_files import write_rows

# Films and books are answered by one adapter, songs by another; a third one serves songs alone.
NOUNS = {"films": ("film", 0), "books": ("book", 0), "songs": ("song", 1)}
ROWS = {"train": 50, "validation": 40, "test": 60}


@pytest.fixture
def folder(tmp_path):
    """What a study of budgets leaves of a seed."""
    made, rng = tmp_path / "seed", np.random.default_rng(0)
    arrays = {name: {} for name in ("first", "second", "own", TARGETS)}
    for task, (noun, right) in NOUNS.items():
        for number, (split, count) in enumerate(ROWS.items()):
            rows = toy.text_rows(count, number, noun)
            write_rows(made / "tasks" / task / f"{split}.jsonl", rows)
            targets = np.array([row["label"] for row in rows], dtype=np.int16)
            for member, name in enumerate(("first", "second")):
                logits = 0.5 * rng.normal(size=(count, 2))
                logits[np.arange(count), targets] += 2.0 if member == right else -1.0
                values = logits - np.log(np.exp(logits).sum(1, keepdims=True))
                arrays[name][f"{split}/{task}"] = values.astype(np.float16)
            arrays[TARGETS][f"{split}/{task}"] = targets
            if task == "songs":
                arrays["own"][f"{split}/{task}"] = values.astype(np.float16)
    (made / "outputs").mkdir()
    for name, own in arrays.items():
        np.savez(made / "outputs" / f"{name}.npz", **own)
    system = {"label": "both", "parts": ["first", "second", "own"], "own": {}, "predicted": {}, "together": False}
    (made / PLAN).write_text(json.dumps({"tasks": list(NOUNS), "systems": [system]}))
    return made


def test_what_a_router_keeps_is_measured_beside_known_tasks(folder, tmp_path, monkeypatch, capsys):
    model = toy.save_model(toy.bert(2).bert, tmp_path / "encoder")
    command = [study.__file__, str(tmp_path / "results"), "--folders", str(folder), "--system", "both"]
    monkeypatch.setattr(sys, "argv", [*command, "--model_name_or_path", model])
    study.main()
    (seed,) = json.loads((tmp_path / "results.json").read_text())["seeds"]
    assert seed["members"] == 2
    losses = {way: np.mean(list(own.values())) for way, own in seed["losses"].items()}
    assert set(losses) == {EQUAL, KNOWN, ROUTED, PROMPTS, OTHERS}
    # The noun says which adapter is right; of songs the other tasks do not know it.
    for way in (ROUTED, PROMPTS):
        assert losses[KNOWN] - 1e-6 <= losses[way] < losses[EQUAL] - 0.9 * (losses[EQUAL] - losses[KNOWN])
    assert seed["losses"][OTHERS]["songs"] > seed["losses"][EQUAL]["songs"]
    table = (tmp_path / "results.md").read_text()
    assert "| 100% |" in table and seed["routers"][PROMPTS]["chosen"] in table and "| 0% |" in table
