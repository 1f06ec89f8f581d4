"""The study of choices lists ensembles that can be trained, and reads what their adapters say."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from helpers.feature_tables import NAMES, world
from hf_ensemble import TrainingRecipe
from hf_ensemble.estimate import SubsetEstimator
from hf_ensemble.select import DataSelector

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.budgets.systems import ONE_FOR_ALL, SYSTEMS, Part, parts_without_choice
from benchmarks.budgets.train import CHOICES, PLAN, TARGETS
from benchmarks.choices import run as study
from benchmarks.choices.ensembles import Chooser
from benchmarks.choices.trained import of_folder

RECIPE = TrainingRecipe([0.02] * 40, 8, 300.0)
BUDGET = 2.0


@pytest.fixture(scope="module", params=[False, True], ids=["fresh", "going on"])
def chooser(request):
    lengths = (0.25, 0.5, 2.0) if request.param else ()
    selector = DataSelector(SubsetEstimator(*world(), recipe=RECIPE, other_lengths=lengths))
    return Chooser(selector, goes_on=request.param, output_scales=selector.estimator.can_be_scaled)


@pytest.fixture(scope="module")
def others(chooser):
    return chooser.rivals(BUDGET, seed=0)


def test_rivals_cost_no_more_than_the_choice_may(chooser, others):
    assert len(others) == 20 and len({repr(asdict(one)) for one in others}) > 10
    for one in [*others, chooser.chosen(BUDGET), chooser.together()]:
        weights = np.array([[own.get(name, 0.0) for name in NAMES] for own in one.mixtures]).reshape(-1, len(NAMES))
        cost = 1 + chooser.estimator.training_cost(weights, np.array(one.lengths)).sum()
        assert one.cost == pytest.approx(cost) and one.cost <= BUDGET + 1e-6
        assert list(one.serving) == list(NAMES) and set(one.serving.values()) <= {-1, *range(len(one.mixtures))}


def test_ensembles_are_predicted_as_served(chooser, others):
    start = chooser.together()
    for one in others:
        weights = np.array([[own.get(name, 0.0) for name in NAMES] for own in one.mixtures])
        losses = chooser.estimator.predict(weights, lengths=np.array(one.lengths)).loss
        served = {task: losses[k, NAMES.index(task)] for task, k in one.serving.items() if k >= 0}
        if len(served) == len(NAMES):
            assert one.predicted_loss == pytest.approx(np.mean(list(served.values())))
        if "random" in one.label:
            assert one.predicted_loss <= start.predicted_loss + 1e-9


def outputs(folder, logits):
    """Log-probabilities of adapters for two tasks' rows, whose first label is right."""
    arrays = {TARGETS: {}}
    for task in ("films", "books"):
        for split, count in (("validation", 20), ("test", 40)):
            arrays[TARGETS][f"{split}/{task}"] = np.zeros(count, np.int16)
            for part, own in logits.items():
                values = np.tile([own[task], 0.0], (count, 1))
                # Every fourth row is wrong.
                values[::4] = values[::4, ::-1]
                rows = (values - np.log(np.exp(values).sum(1, keepdims=True))).astype(np.float16)
                arrays.setdefault(part, {})[f"{split}/{task}"] = rows
    (folder / "outputs").mkdir(parents=True)
    for name, own in arrays.items():
        np.savez(folder / "outputs" / f"{name}.npz", **own)


def test_true_losses_are_those_left_with_a_scale(tmp_path):
    right = float(np.log(3.0))
    outputs(tmp_path, {"all": {"films": 9.0, "books": 0.2}, "one": {"films": right, "books": 5.0}})
    plan = {"tasks": ["films", "books"], "train_rows": {}, "systems": [], "machine": "m", "versions": {}}
    (tmp_path / PLAN).write_text(json.dumps(plan))

    def ensemble(label, serving):
        loss = {"cost": 1.5, "predicted_loss": 0.6, "expected_loss": None}
        return {"label": label, "mixtures": [{"films": 1.0}], "serving": serving, "parts": ["one", "all"], **loss}

    together = {**ensemble(ONE_FOR_ALL, {"films": -1, "books": -1}), "mixtures": [], "parts": ["all"]}
    own = ensemble("films alone", {"films": 0, "books": -1})
    listed = {"baseline": [together], "choices": [own], "chosen": [own], "others": [together, own]}
    (tmp_path / CHOICES).write_text(json.dumps({"budget": BUDGET, "ensembles": listed}))
    budget, lines = of_folder(tmp_path)
    calibrated = 0.75 * np.log(4 / 3) + 0.25 * np.log(4)
    assert budget == BUDGET and lines["choices"][0]["num_mixtures"] == 1
    true, plain = lines["choices"][0]["true"], lines["baseline"]["true"]
    # The adapter that is as sure as it is right stays as it is, and one that is too sure is held back.
    scaled = {split: 2 * plain[split] for split in ("validation", "test")}
    for split in scaled:
        assert true[split] < plain[split]
        assert calibrated < scaled[split] / 2 < 0.75 * np.log1p(np.exp(-9)) + 0.25 * 9
    assert true["test_reassigned"] <= true["test"] + 1e-9


def test_choices_of_seeds_are_one_table(tmp_path, monkeypatch, capsys):
    for seed in range(2):
        folder = tmp_path / str(seed)
        outputs(folder, {"all": {"films": 1.0, "books": 0.5 + seed}})
        plan = {"tasks": ["films", "books"], "train_rows": {}, "systems": [], "machine": "m", "versions": {}}
        (folder / PLAN).write_text(json.dumps(plan))
        losses = {"predicted_loss": 0.6, "expected_loss": 0.7}
        one = {"label": "a choice", "mixtures": [], "parts": ["all"], "cost": 1.0, **losses}
        one["serving"] = {"films": -1, "books": -1}
        listed = {"baseline": [one], "choices": [one], "chosen": [one], "others": [one]}
        (folder / CHOICES).write_text(json.dumps({"budget": BUDGET + (seed > 1), "ensembles": listed}))
    command = [study.__file__, str(tmp_path / "found"), "--trained", str(tmp_path / "0"), str(tmp_path / "1")]
    monkeypatch.setattr(sys, "argv", command)
    study.main()
    table = (tmp_path / "found.md").read_text()
    assert "2 choices with a random number" in table and table.count("Seed 1:") == 2
    (tmp_path / "1" / CHOICES).write_text(json.dumps({"budget": 3.0, "ensembles": listed}))
    with pytest.raises(SystemExit):
        study.main()
    assert "expected choices of one budget, found 2.0, 3.0" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command, "--data", "x"])
    with pytest.raises(SystemExit):
        study.main()
    assert "take no other flags: --data x" in capsys.readouterr().err


def test_parts_of_wanted_systems_come_first():
    names = ["a", "b", "c"]
    everything = Part(dict.fromkeys(names, 1.0))
    assert list(parts_without_choice(names, 0, [])) == [everything.name]
    each = parts_without_choice(names, 0, ["one for all, then each task, at 1.5"])
    assert [(part.length, part.goes_on) for part in each.values()] == [(1.0, False), *[(0.5, True)] * 3]
    assert set(each) < set(parts_without_choice(names, 0))
    assert next(iter(SYSTEMS)) == ONE_FOR_ALL and len(SYSTEMS) == 30


def test_unknown_systems_are_refused_at_once(tmp_path, monkeypatch, capsys):
    from benchmarks.budgets import train

    monkeypatch.setattr(sys, "argv", [train.__file__, str(tmp_path / "out"), "--systems", "the best one"])
    with pytest.raises(SystemExit):
        train.main()
    assert "invalid choice: 'the best one'" in capsys.readouterr().err and not (tmp_path / "out").exists()
