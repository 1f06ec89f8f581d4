"""An ensemble beside the simpler systems: what each is made of, and that nothing is made twice."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from helpers import toy
from helpers.trainers import sft_trainer, text_trainer
from hf_ensemble import BaselineComparison, PeftEnsembleModel
from hf_ensemble.cli.arguments import CompareArguments
from hf_ensemble.ensemble.merging import task_vectors
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.runs import Comparison, RunDirectory, SystemCost
from hf_ensemble.train.comparison import BASELINES, adapters, comparison, makers
from hf_ensemble.train.task_trainer import TaskSFTTrainer


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison with every system at toy size."""
    folder = tmp_path_factory.mktemp("compared")
    base = toy.save_model(toy.llama(), folder / "base")
    # Groups that go on from the adapter for all: the ensemble takes more than it, and gradients are captured there.
    settings = {"num_groups": 2, "num_train_epochs": 1, "ensemble_weights": "own_group"}
    settings |= {"group_initialization": "baseline", "continued_length": 0.5}
    trainer = sft_trainer(folder / "run", base, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(makers, "_EVALUATIONS", 3)
        found = BaselineComparison(trainer, num_seeds=2).run()
    return trainer, found, lambda: sft_trainer(folder / "run", base, **settings)


def test_every_system_is_scored_and_costed(compared):
    trainer, found, _ = compared
    assert list(found.systems) == ["base", "baseline", "ensemble", *BASELINES] and found.left_out == {}
    tasks = list(trainer.tasks)
    for system, own in found.systems.items():
        assert list(own.scores) == list(own.rows) == tasks, system
        assert own.cost.inference_flops > 0 and (own.cost.training_flops > 0) == (system != "base")
    costs = {name: own.cost for name, own in found.systems.items()}
    known = {own.name: own for own in trainer.run_directory.trainings()}
    for cost in costs.values():
        assert cost.training_flops == pytest.approx(sum(known[name].flops for name in cost.trainings))
        assert cost.training_tokens == sum(known[name].tokens for name in cost.trainings)
    # Trainings on all rows once: in whatever groups, of whatever rank.
    whole = costs["baseline"].training_tokens
    for name in ("per_task", "random_groups", "gradient_clusters", "average", "ties", "lorahub", "arrow"):
        assert costs[name].training_tokens == whole, name
    assert costs["seeds"].training_tokens == 2 * whole
    ratio = costs["ensemble"].training_flops / costs["baseline"].training_flops
    steps = known["baseline"].global_step
    assert 1.3 < ratio < 2
    assert costs["scaled"].trainings == ["baseline"] and costs["longer_scaled"].trainings == costs["longer"].trainings
    for name in ("longer", "wider"):
        assert known[f"compared-{name}"].global_step == math.ceil(ratio * steps), name
    for task in tasks:
        own, half = (known[f"compared-{name}-{task}"].global_step for name in ("task", "finetuned"))
        assert half == math.ceil(own / 2)
    assert costs["finetuned"].trainings == ["baseline", *(f"compared-finetuned-{task}" for task in tasks)]
    one = costs["baseline"].stored_parameters
    stored = {"per_task": 3, "finetuned": 3, "seeds": 2, "wider": 2, "longer": 1, "average": 3, "random_groups": 2}
    assert {name: costs[name].stored_parameters / one for name in stored} == stored
    assert costs["seeds"].inference_flops == pytest.approx(2 * costs["longer"].inference_flops)
    assert found.systems["scaled"].search_flops > 0
    assert found.systems["lorahub"].search_flops > 0 < found.systems["task_arithmetic"].search_flops


def test_the_run_and_the_table_hold_the_comparison(compared):
    trainer, found, _ = compared
    run = trainer.run_directory
    assert run.read(Comparison) == found
    text = run.comparison_table.read_text()
    assert text == found.to_markdown()
    assert text.count("\n| ") == len(found.systems) + 1 and "| one adapter for all |" in text
    intervals = found.intervals()
    assert intervals["baseline"].mean_difference == {}
    difference = intervals["per_task"].mean_difference["loss"]
    expected = found.mean("per_task").loss - found.mean("baseline").loss
    assert difference.value == pytest.approx(expected, abs=1e-5)
    assert difference.interval[0] <= difference.value <= difference.interval[1]


def test_a_comparison_takes_what_is_there_and_goes_on_after_a_kill(compared, monkeypatch):
    trainer, found, again = compared
    monkeypatch.setattr(TaskSFTTrainer, "train", lambda *a, **k: pytest.fail("trained again"))
    record = trainer.run_directory.where(Comparison)
    kept = {name: found.systems[name] for name in ("base", "baseline")}
    trainer.run_directory.write(Comparison(found.split, kept))
    names = ["per_task", "seeds", "ties"]
    resumed = BaselineComparison(again(), names).run()
    assert list(resumed.systems) == ["base", "baseline", "ensemble", *sorted(names, key=BASELINES.index)]
    for name, own in resumed.systems.items():
        expected = found.systems[name]
        assert own.cost.trainings == expected.cost.trainings
        for task, scores in own.scores.items():
            assert scores.loss == pytest.approx(expected.scores[task].loss, abs=1e-5)
    assert json.loads(record.read_text())["split"] == "eval"


def test_the_model_is_left_as_the_run_left_it(compared):
    trainer, _, _ = compared
    assert set(trainer.ensemble.model.peft_config) == {"default", *trainer.ensemble.adapter_names}
    left = [name for name, _ in trainer.ensemble.model.named_modules() if "compared" in name or "arrow" in name]
    assert left == []
    trainer.evaluate()


def test_one_adapter_is_scaled_as_the_ensemble_is(compared):
    trainer, found, _ = compared
    maker = BaselineComparison(trainer)._maker()
    with trainer.working():
        made = maker.make("scaled")
    assert made.scales and set(made.scales) <= set(trainer.tasks)
    flow = trainer.flow
    # Validation rows are what the scales were fitted to: they do no worse there.
    assert found.split == "eval"
    for task in trainer.tasks:
        losses = [found.systems[name].scores[task].loss for name in ("scaled", "baseline")]
        assert losses[0] <= losses[1] + 1e-6
        assert (losses[0] < losses[1] - 1e-6) == (task in made.scales)
    # The same logits, times the scale.
    task = next(iter(made.scales))
    with trainer.working(), adapters.loaded_adapters(flow, made.together) as members:
        ensemble = PeftEnsembleModel(flow.context.model, members, scales=made.scales)
        ensemble.weights = {task: {"scaled": 1.0}}
        batch = flow.context.data_collator([flow.context.eval_tables[task][0]])
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            scaled = ensemble(**inputs, task=task).logits
            ensemble.scales = {}
            plain = ensemble(**inputs, task=task).logits
    assert torch.allclose(scaled, made.scales[task] * plain, atol=1e-5)


def test_the_average_is_the_mean_of_the_tasks_changes(compared):
    trainer, _, _ = compared
    folder = trainer.run_directory.compared("average")
    merged = load_file(str(folder / "adapter_model.safetensors"))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    changes = []
    for task in trainer.tasks:
        own = load_file(str(trainer.run_directory.compared(f"task-{task}") / "adapter_model.safetensors"))
        changes.append(2.0 * own[name.format("B")] @ own[name.format("A")])
    assert torch.allclose(merged[name.format("B")] @ merged[name.format("A")], sum(changes) / 3, atol=1e-6)


def test_a_search_for_weights_lowers_what_it_searches_for(compared, monkeypatch):
    """From equal weights, on the rows that are searched on, penalty included."""
    trainer, _, _ = compared
    monkeypatch.setattr(makers, "_EVALUATIONS", 3)
    comparison, context = BaselineComparison(trainer), trainer.flow.context
    maker = comparison._maker()
    task = maker.names[0]
    with trainer.working(), maker._loaded(maker._per_task()) as members:
        ensemble = PeftEnsembleModel(context.model, members, label_space=context.label_space, combination="weights")

        def objective(weights):
            ensemble.weights = {task: weights}
            scores = trainer.flow.evaluation.score_ensemble(ensemble, {task: context.eval_tables[task]})
            return scores[task].loss + makers._PENALTY * np.mean(np.abs(list(weights.values())))

        found = maker._searched(ensemble, task)
        assert objective(found) < objective(dict.fromkeys(members, 1 / 3)) - 1e-3
        assert all(abs(weight) <= makers._RANGE for weight in found.values())


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({}, set()),
        ({"continued_length": 1.0}, {"finetuned"}),
        ({"num_groups": 3}, {"random_groups", "gradient_clusters"}),
        ({"num_seeds": 3}, {"seeds"}),
        ({"seed": 1}, {"random_groups"}),
    ],
)
def test_what_was_made_with_other_settings_is_made_anew(compared, changes, lost):
    trainer, found, _ = compared
    trainer.run_directory.write(found)
    changed = BaselineComparison(trainer, **{"num_seeds": 2, **changes})
    assert set(found.systems) - set(changed._known("eval", changed._maker()).systems) == lost


def test_tasks_named_by_digits_have_folders_of_their_own(tmp_path):
    names = ["0", "1", "2"]
    flow = SimpleNamespace(context=SimpleNamespace(run=RunDirectory(tmp_path), tasks=SimpleNamespace(names=names)))
    maker = makers.SystemMaker(flow, 1.0, 0.5, 2, 2, 0)
    maker._trained = lambda name, group, **options: name
    made = maker._groups("random-0", [["1"], ["0", "2"]])
    assert made.serving["0"] == made.serving["2"] != made.serving["1"] and len(set(made.trainings)) == 2


def test_tokens_stand_in_for_operations_that_were_not_counted():
    counted = [SystemCost(300.0, 20), SystemCost(100.0, 10)]
    assert makers.training_ratio(*counted) == 3.0
    # Compiled graphs are not seen.
    assert makers.training_ratio(SystemCost(0.0, 20), SystemCost(0.0, 10)) == 2.0


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_wider_adapter_is_scaled_as_the_narrow_one_in_every_layer(use_rslora):
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.self_attn.v_proj": 6}}
    model = toy.with_lora(toy.llama(), target_modules=["q_proj", "v_proj"], use_rslora=use_rslora, **patterns)
    model.add_adapter("wide", adapters.widened(model.peft_config["default"], 3))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert {layer.r["default"] for layer in layers} == {2, 4} and len(
        {layer.scaling["default"] for layer in layers}
    ) == 3
    for layer in layers:
        assert layer.r["wide"] == 3 * layer.r["default"]
        assert layer.scaling["wide"] == pytest.approx(layer.scaling["default"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"baselines": "best"}, r"Expected baselines to be 'all' or some of \['scaled', 'longer'.*found \['best'\]"),
        ({"baselines": []}, "Expected baselines to be 'all'"),
        ({"continued_length": 0}, "continued_length"),
        ({"num_groups": 1}, "num_groups"),
        ({"num_groups": 4}, "Expected num_groups up to 3 tasks, found 4"),
        ({"num_seeds": 1}, "num_seeds"),
    ],
)
def test_what_cannot_be_compared_is_refused_at_once(compared, arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        BaselineComparison(compared[0], **arguments)


def test_systems_that_the_adapters_do_not_allow_are_named(tmp_path):
    trainer = text_trainer(tmp_path / "run", toy.bert(4), toy.text_tasks(), num_groups=1)
    with pytest.raises(ConfigurationError, match="These baselines cannot be made: ties: It needs plain LoRA"):
        BaselineComparison(trainer, ["per_task", "ties"])
    allowed = BaselineComparison(trainer)
    assert set(allowed.left_out) == {"wider", "average", "task_arithmetic", "ties", "tsv", "knots", "lorahub", "arrow"}
    assert allowed.names == [
        *("scaled", "longer", "longer_scaled", "per_task", "finetuned", "random_groups", "gradient_clusters", "seeds")
    ]
    without = text_trainer(tmp_path / "other", toy.bert(4), toy.text_tasks(), train_baseline=False)
    with pytest.raises(ConfigurationError, match="train_baseline=False does not train"):
        BaselineComparison(without)
    with pytest.raises(ConfigurationError, match="Expected an EnsembleTrainer"):
        BaselineComparison(toy.llama())


def test_the_command_names_every_system():
    assert ", ".join(BASELINES) in CompareArguments.__dataclass_fields__["baselines"].metadata["help"]
    assert comparison._OF_THE_RUN == ("base", "baseline", "ensemble")


def test_tsv_adds_orthogonal_directions_and_keeps_a_single_change():
    torch.manual_seed(0)
    first, second = torch.zeros(6, 8), torch.zeros(6, 8)
    first[0, 0], second[1, 1] = 2.0, 3.0
    equal = torch.tensor([0.5, 0.5])
    assert torch.allclose(task_vectors.tsv([first, second], equal), first + second, atol=1e-6)
    change = torch.randn(6, 2) @ torch.randn(2, 8)
    assert torch.allclose(task_vectors.tsv([change], torch.ones(1)), change, atol=1e-5)
    # Two changes along one direction do not add up beyond what orthogonal ones would.
    twice = task_vectors.tsv([first, first], equal)
    assert torch.linalg.matrix_norm(twice, 2) <= 2.0 * 2 + 1e-5


def test_knots_is_ties_in_a_common_basis():
    torch.manual_seed(0)
    change = torch.randn(6, 2) @ torch.randn(2, 8)
    equal = torch.tensor([0.5, 0.5])
    assert torch.allclose(task_vectors.knots([change, change], equal, density=1.0), change, atol=1e-4)
    # Whatever the basis of the outputs is.
    rotation = torch.linalg.qr(torch.randn(6, 6))[0]
    other = torch.randn(6, 2) @ torch.randn(2, 8)
    merged = task_vectors.knots([change, other], equal)
    turned = task_vectors.knots([rotation @ change, rotation @ other], equal)
    assert torch.allclose(turned, rotation @ merged, atol=1e-4)
