"""The study of an ensemble beside simpler systems reports what the comparisons of its runs say."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.baselines import run as study
from helpers import toy
from helpers.task_files import flags, write_tasks
from hf_ensemble.runs import Comparison, RunDirectory
from hf_ensemble.runs.systems import BASELINE

SIZES = ["--rows", "6", "--validation_rows", "4", "--test_rows", "3"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(*words):
        output = tmp_path / "results"
        monkeypatch.setattr(sys, "argv", [study.__file__, str(output), "--output_dir", str(tmp_path / "out"), *words])
        study.main()
        return json.loads(output.with_suffix(".json").read_text())

    return run


def test_figures_are_those_of_the_comparisons(run, tmp_path):
    data, model = write_tasks(tmp_path / "data", toy.sft_tasks()), toy.save_model(toy.llama(), tmp_path / "model")
    given = [*SIZES, "--seeds", "0", "1", "--baselines", "longer", "--budget", "1.5", "--data", str(data)]
    more = flags(model_name_or_path=model, num_train_epochs=1, learning_rate=0.01)
    results = run(*given, *more)
    runs = [RunDirectory(tmp_path / "out" / f"seed-{seed}-budget-1.5") for seed in (0, 1)]
    made = [own.read(Comparison) for own in runs]
    assert [own["system"] for own in results["systems"]] == ["base", BASELINE, "ensemble", "longer"]
    of_system = {own["system"]: own for own in results["systems"]}
    for name, own in of_system.items():
        assert own["figures"]["loss"] == [one.mean(name).loss for one in made]
        assert own["figures"]["accuracy"] == [one.mean(name).accuracy for one in made]
        for task, scores in own["tasks"].items():
            assert scores["loss"] == pytest.approx(
                np.mean([one.systems[name].scores[task].loss for one in made]), rel=1e-5
            )
    assert set(results["train_rows"].values()) == {6}
    losses = {name: np.mean(own["figures"]["loss"]) for name, own in of_system.items()}
    difference, low, high = of_system["ensemble"]["differences"]["loss"]
    assert difference == pytest.approx(losses["ensemble"] - losses[BASELINE], abs=1e-5) and low <= difference <= high
    assert of_system[BASELINE]["training_cost"] == 1.0 <= of_system["ensemble"]["training_cost"] < 1.6
    # Seeds draw other training rows, and have the same test rows.
    drawn = {
        split: [_rows(tmp_path / "out" / f"tasks-{seed}", split) for seed in (0, 1)] for split in ("train", "test")
    }
    assert drawn["train"][0] != drawn["train"][1] and drawn["test"][0] == drawn["test"][1]
    # Nothing is made again.
    assert run(*given, *more) == results


def _rows(folder, split):
    return {path.parent.name: path.read_text() for path in folder.glob(f"*/{split}.jsonl")}


def test_skills_are_compared_by_their_answers(tmp_path, monkeypatch):
    compared = []

    class Compared:
        def __init__(self, trainer, baselines):
            compared.append((trainer, baselines))

        def run(self):
            pass

    monkeypatch.setattr(study, "BaselineComparison", Compared)
    sizes = {"rows": 6, "validation_rows": 4, "test_rows": 3, "pretraining_rows": 64, "epochs": 1.0}
    settings = SimpleNamespace(output_dir=tmp_path, budget=1.1, baselines=["longer"], **sizes)
    run = study.skills_run(settings, 1)
    [(trainer, baselines)] = compared
    assert baselines == ["longer"] and trainer.run_directory is run and trainer.args.compute_budget == 1.1
    assert len(trainer.tasks) == 10 and set(study.CORRUPTED).isdisjoint(trainer.tasks)
    assert {len(own) for own in trainer.tasks.split("test").values()} == {3}
    assert set(trainer.answer_metrics.values()) == {study.METRIC}


def test_flags_without_tasks_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("--num_train_epochs", "1")
    assert "go with --data: --num_train_epochs 1" in capsys.readouterr().err
