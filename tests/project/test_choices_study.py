"""The study of choices lists ensembles that can be trained, and reads what their adapters say."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from helpers.feature_tables import NAMES, world
from hf_ensemble import TrainingRecipe
from hf_ensemble.estimate import SubsetEstimator
from hf_ensemble.estimate.output_scale import SCALE_SPREAD
from hf_ensemble.select import DataSelector

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.budgets.systems import ONE_FOR_ALL, SYSTEMS, Part, SystemBuilder, parts_without_choice
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


def losses_left(folder, part, split):
    """Mean loss of each task that is left with the scale that is most probable by the validation rows."""
    with np.load(folder / "outputs" / f"{part}.npz") as found:
        rows = {name: own.astype(np.float64) for name, own in found.items()}

    def loss(log_scale, name):
        odds = rows[name][:, 0] - rows[name][:, 1]
        return float(np.logaddexp(0.0, -np.exp(log_scale) * odds).mean())

    def penalized(log_scale, name):
        return loss(log_scale, name) + log_scale**2 / (2 * len(rows[name]) * SCALE_SPREAD**2)

    scales = {
        task: minimize_scalar(penalized, bounds=(-2, 2), args=(f"validation/{task}",)).x for task in ("films", "books")
    }
    return {task: loss(own, f"{split}/{task}") for task, own in scales.items()}


def test_true_losses_are_those_left_with_a_scale(tmp_path):
    outputs(tmp_path, {"all": {"films": 9.0, "books": 0.2}, "one": {"films": 1.1, "books": 5.0}})
    plan = {"tasks": ["films", "books"], "train_rows": {}, "systems": [], "machine": "m", "versions": {}}
    (tmp_path / PLAN).write_text(json.dumps(plan))
    own = {"label": "books alone", "cost": 1.5, "predicted_loss": 0.6, "expected_loss": None, "parts": ["one", "all"]}
    own |= {"mixtures": [{"books": 1.0}], "serving": {"films": -1, "books": 0}}
    together = {**own, "mixtures": [], "serving": {"films": -1, "books": -1}, "parts": ["all"]}
    listed = {"baseline": [together], "choices": [own], "chosen": [own], "others": [together, own]}
    (tmp_path / CHOICES).write_text(json.dumps({"budget": BUDGET, "ensembles": listed}))
    budget, lines = of_folder(tmp_path)
    assert budget == BUDGET and lines["choices"][0]["num_mixtures"] == 1 and lines["baseline"]["num_mixtures"] == 0
    for split in ("validation", "test"):
        one, every = (losses_left(tmp_path, part, split) for part in ("one", "all"))
        expected = (every["films"] + one["books"]) / 2
        assert lines["choices"][0]["true"][split] == pytest.approx(expected, abs=1e-3)
        assert lines["baseline"]["true"][split] == pytest.approx(np.mean(list(every.values())), abs=1e-3)
    # Each task could have had the other adapter, which has the lower validation loss.
    assert lines["choices"][0]["true"]["test_reassigned"] == pytest.approx(
        (one["films"] + every["books"]) / 2, abs=1e-3
    )


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
        (folder / CHOICES).write_text(json.dumps({"budget": BUDGET, "ensembles": listed}))
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


def test_trainings_without_a_choice_are_those_of_the_systems():
    def selector(lengths):
        recipe = {"recipe": RECIPE, "length": lengths[0], "other_lengths": tuple(lengths[1:])}
        return DataSelector(SubsetEstimator(*world(), **recipe))

    names, builder = list(NAMES), SystemBuilder(selector([1.0]), selector, 0)
    everything = Part(dict.fromkeys(names, 1.0)).name
    assert list(parts_without_choice(names, 0, [])) == [everything]
    early = [label for label in SYSTEMS if len(parts_without_choice(names, 0, [label])) > 1]
    # One adapter, longer, and each task alone, at three lengths; single tasks, random groups, seeds, and two wide ones.
    assert len(early) == 3 + 3 + 5
    for label in early:
        if "chosen" not in label:
            (first, system) = builder([label])
            assert (first.label, system.label) == (ONE_FOR_ALL, label)
            assert set(parts_without_choice(names, 0, [label])) == {everything, *(part.name for part in system.parts)}
    assert set().union(*(parts_without_choice(names, 0, [label]) for label in early)) == set(
        parts_without_choice(names, 0)
    )


def test_unknown_systems_are_refused_at_once(tmp_path, monkeypatch, capsys):
    from benchmarks.budgets import train

    monkeypatch.setattr(sys, "argv", [train.__file__, str(tmp_path / "out"), "--systems", "the best one"])
    with pytest.raises(SystemExit):
        train.main()
    assert "invalid choice: 'the best one'" in capsys.readouterr().err and not (tmp_path / "out").exists()
