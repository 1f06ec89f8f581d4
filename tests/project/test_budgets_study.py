"""The study of budgets adds up seeds that were scored at different times."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.budgets import run as study
from benchmarks.budgets.systems import ONE_FOR_ALL
from benchmarks.budgets.train import PLAN, TARGETS

ROWS = {"validation": 30, "test": 80}
LONGER = f"{ONE_FOR_ALL}, 2 times as long"


def trained(folder, seed, *more):
    """What the trainings of a seed leave: one adapter for all, and another one for each of `more`."""
    rows, rng, labels = np.random.default_rng(0), np.random.default_rng(seed), [ONE_FOR_ALL, *more]
    arrays = {name: {} for name in (*labels, TARGETS)}
    for task in ("films", "books"):
        for split, count in ROWS.items():
            targets = rows.integers(2, size=count).astype(np.int16)
            arrays[TARGETS][f"{split}/{task}"] = targets
            for number, label in enumerate(labels):
                logits = rng.normal(size=(count, 2))
                logits[np.arange(count), targets] += 0.5 + number
                arrays[label][f"{split}/{task}"] = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype("f2")
    (folder / "outputs").mkdir(parents=True)
    for name, own in arrays.items():
        np.savez(folder / "outputs" / f"{name}.npz", **own)
    systems = [
        {
            "label": label,
            "cost": 1.0 + number,
            "parts": [label],
            "own": {"films": label, "books": label},
            "predicted": {"films": 0.3 + seed, "books": 0.5 + seed} if number else {},
            "together": False,
        }
        for number, label in enumerate([*labels, "never trained"])
    ]
    plan = {"tasks": ["films", "books"], "train_rows": {"films": 9, "books": 9}, "steps": 10 + seed, "systems": systems}
    (folder / PLAN).write_text(json.dumps({**plan, "machine": "m", "versions": {}}))
    return folder


@pytest.fixture
def scored(tmp_path, monkeypatch, capsys):
    def command(name, *words):
        monkeypatch.setattr(sys, "argv", [study.__file__, str(tmp_path / name), *map(str, words)])
        study.main()
        return json.loads((tmp_path / f"{name}.json").read_text())["recipes"]

    return command


def test_seeds_scored_before_count_as_those_scored_now(tmp_path, scored):
    folders = [trained(tmp_path / "0", 0, LONGER), trained(tmp_path / "1", 1, LONGER), trained(tmp_path / "2", 2)]
    names = [f"short={folder}" for folder in folders]
    together = scored("together", "--folders", *names[:2])["short"]
    scored("first", "--folders", names[0])
    apart = scored("apart", "--folders", names[1], "--earlier", tmp_path / "first.json")["short"]
    assert apart["seeds"] == 2 and sorted(apart["steps"]) == [10, 11] and apart["unfinished"] == ["never trained"]
    for expected, found in zip(together["systems"], apart["systems"]):
        assert (found["system"], found["seeds"], found["cost"]) == (expected["system"], 2, expected["cost"])
        assert found["predicted_validation_loss"] == expected["predicted_validation_loss"]
        for name in ("validation_loss", "test_loss", "test_accuracy"):
            assert found["own"][name] == pytest.approx(expected["own"][name])
        assert found["own"]["accuracy_of_seeds"] == pytest.approx(expected["own"]["accuracy_of_seeds"])
        value, lower, upper = found["own"]["differences"]["accuracy"]
        own, *interval = expected["own"]["differences"]["accuracy"]
        # Other rows are right in the other seed, so that the interval of the mean is narrower.
        assert value == pytest.approx(own)
        if found["system"] == LONGER:
            assert lower < interval[0] < interval[1] < upper
    # A system that a seed lacks, and a recipe that only one of the results has.
    more = scored("more", "--folders", names[2], "--earlier", tmp_path / "together.json")["short"]
    assert {one["system"]: one["seeds"] for one in more["systems"]} == {ONE_FOR_ALL: 3, LONGER: 2}
    means = [
        own["systems"][0]["own"]["test_loss"] for own in (together, scored("last", "--folders", names[2])["short"])
    ]
    assert more["systems"][0]["own"]["test_loss"] == pytest.approx((2 * means[0] + means[1]) / 3)
    assert set(scored("both", "--folders", f"long={folders[2]}", "--earlier", tmp_path / "first.json")) == {
        "short",
        "long",
    }
    assert f"| {LONGER} | 2 | 2.00 |" in (tmp_path / "more.md").read_text()


def test_seeds_of_other_rows_are_no_seeds_of_this_recipe(tmp_path, scored):
    scored("first", "--folders", f"short={trained(tmp_path / '0', 0)}")
    other = trained(tmp_path / "1", 1)
    plan = json.loads((other / PLAN).read_text())
    (other / PLAN).write_text(json.dumps({**plan, "train_rows": {"films": 9, "books": 8}}))
    with pytest.raises(SystemExit, match="results of the same train_rows are expected"):
        scored("second", "--folders", f"short={other}", "--earlier", tmp_path / "first.json")
