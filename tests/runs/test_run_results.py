"""What the records of a run come to together."""

from dataclasses import replace

import pytest

from helpers.report_runs import NAMES, ensemble_run
from hf_ensemble.evaluate import TaskScores
from hf_ensemble.runs import (
    Boosting,
    BoostingStep,
    ComparedSystem,
    Comparison,
    EnsembleWeights,
    SystemCost,
    run_results,
)
from hf_ensemble.select import Grouping


def step(name, kept):
    return BoostingStep(name, "sums", ["sums"], "surrogate", kept, 0.5, 2.0, 1.5, 0.4, 0.1, 2.0, 1.5)


@pytest.mark.parametrize("kept", [True, False])
def test_an_ensemble_with_boosting_steps_is_no_adapter_for_all(tmp_path, kept):
    run = ensemble_run(tmp_path)
    run.write(EnsembleWeights({task: {"baseline": 1.0} for task in NAMES}))
    run.write(Boosting([step("boost_0", kept)]))
    results = run_results(run)
    assert results.equals_baseline == (not kept) and ("boost_0" in results.weights["sums"]) == kept
    assert results.verdict.startswith("Three adapters lower the loss" if kept else "One adapter is enough")


@pytest.mark.parametrize("one_for_all", ["baseline", "group_1"])
def test_what_a_scale_gives_the_one_adapter_for_all_is_known_from_the_weights(tmp_path, one_for_all):
    run = ensemble_run(tmp_path)
    grouping = run.read(Grouping)
    run.write(replace(grouping, baseline_group=None if one_for_all == "baseline" else one_for_all))
    losses = {f"adapter {one_for_all}": 1.2, "adapter group_0": 1.5, "chosen": 1.0, "own": 1.1}
    known = {task: {name: loss + place for name, loss in losses.items()} for place, task in enumerate(NAMES)}
    weights = {task: {"group_0": 0.5, one_for_all: 0.5} for task in NAMES}
    run.write(EnsembleWeights(weights, cross_validated=known))
    mean = (len(NAMES) - 1) / 2
    assert run_results(run).scaled_loss == pytest.approx({"baseline": 1.2 + mean, "ensemble": 1.0 + mean})
    # Of some tasks it is no mean over all.
    del known[NAMES[0]][f"adapter {one_for_all}"]
    run.write(EnsembleWeights(weights, cross_validated=known))
    assert run_results(run).scaled_loss == {}


@pytest.mark.parametrize(("start", "expected"), [("fresh", True), ("baseline", False)])
def test_a_group_of_all_tasks_is_one_adapter_for_all_without_a_baseline_too(tmp_path, start, expected):
    run = ensemble_run(tmp_path)
    grouping = run.read(Grouping)
    one = {"groups": {"group_0": NAMES}, "mixtures": {"group_0": dict.fromkeys(NAMES, 1.0)}}
    run.write(replace(grouping, **one, settings={"group_initialization": start}))
    run.write(EnsembleWeights({task: {"group_0": 1.0} for task in NAMES}))
    assert run_results(run).equals_baseline == expected
    assert run_results(run).continues_baseline == (not expected)
    weighted = {"group_0": {**dict.fromkeys(NAMES, 1.0), "sums": 0.5}}
    run.write(replace(grouping, groups={"group_0": NAMES}, mixtures=weighted))
    assert not run_results(run).equals_baseline


@pytest.mark.parametrize(
    ("groups", "weights"),
    [
        (2, {"group_0": 0.5, "group_1": 0.5}),
        (2, {"group_0": 1.0}),
        (1, {"baseline": 1.0}),
        (1, {"baseline": 0.5, "group_0": 0.5}),
    ],
)
def test_what_continues_the_baseline_is_no_one_adapter_beside_another(tmp_path, groups, weights):
    run = ensemble_run(tmp_path)
    grouping = run.read(Grouping)
    names = list(grouping.groups)[:groups]
    own = {"groups": dict.fromkeys(names, NAMES), "mixtures": {name: grouping.mixtures[name] for name in names}}
    run.write(replace(grouping, **own, settings={"group_initialization": "baseline"}))
    run.write(EnsembleWeights(dict.fromkeys(NAMES, weights)))
    assert not run_results(run).continues_baseline


@pytest.mark.parametrize(
    ("weights", "expected"),
    [({"group_0": 0.9, "baseline": 0.1}, True), ({"baseline": 1.0}, False), ({"group_0": 0.5, "group_1": 0.5}, False)],
)
def test_what_continues_the_baseline_does_so_beside_a_little_of_it(tmp_path, weights, expected):
    run = ensemble_run(tmp_path)
    grouping = run.read(Grouping)
    mixtures = {"group_0": dict.fromkeys(NAMES, 1.0), "group_1": {NAMES[0]: 1.0}}
    own = {"groups": {"group_0": NAMES[1:], "group_1": NAMES[:1]}, "mixtures": mixtures}
    run.write(replace(grouping, **own, settings={"group_initialization": "baseline"}))
    run.write(EnsembleWeights(dict.fromkeys(NAMES, weights)))
    assert run_results(run).continues_baseline == expected


def test_names_and_notes_in_the_table_of_a_comparison_are_text():
    scores = {"sums": TaskScores(1.0, 0.5, 4, {"a|b": 0.25, "<i>": 0.5})}
    systems = {
        name: ComparedSystem(scores, {}, SystemCost(), note=note)
        for name, note in {"baseline": "", "per_task": "sums | <b>diffs</b>"}.items()
    }
    lines = Comparison("eval", systems, {"ties": "It needs [plain](x) LoRA."}).to_markdown().split("\n")
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4 and {line.count("|") for line in table} == {len(table[1].split("|")) - 1}
    assert "| a&#124;b | &#60;i&#62; |" in table[0]
    # Each note is a paragraph of its own.
    note = "one adapter per task: sums &#124; &#60;b&#62;diffs&#60;/b&#62;."
    assert lines[-5:] == ["", note, "", "Left out: TIES. It needs &#91;plain&#93;(x) LoRA.", ""]
