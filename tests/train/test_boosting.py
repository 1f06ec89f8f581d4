"""Boosting steps of a run: what they gain, what is kept, and that a killed run goes on."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerCallback

from helpers import toy
from helpers.trainers import killed_in_a_call, sft_trainer, text_trainer
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.ensemble.weighting.added_member import AddedMember
from hf_ensemble.errors import ConfigurationError, EnsembleError
from hf_ensemble.estimate import LINEAR_METHODS
from hf_ensemble.runs import Boosting, EnsembleWeights
from hf_ensemble.train.flows.adapter_training import rows_of
from hf_ensemble.train.flows.boosting import held_out, stage
from hf_ensemble.train.inputs.boosting import check_boosted_model
from hf_ensemble.train.losses.step_loss import BesideEnsembleLoss, RowWeightedLoss

TASKS = toy.sft_tasks(24, 20)
QUICK = {"num_groups": 1, "train_baseline": False, "calibration_runs": 0, "ensemble_weights": "own_group"}
SHORT = {"num_groups": 2, "num_train_epochs": 1, "learning_rate": 3e-3, "num_components": 60}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return toy.save_model(toy.llama(), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def boosted(tmp_path_factory, base):
    """A run with two steps on exact gradients, and its metrics."""
    folder = tmp_path_factory.mktemp("boosted") / "run"
    trainer = sft_trainer(folder, base, TASKS, boosting_steps=2, projection_dim=None, **SHORT)
    return trainer, trainer.train().metrics


def check_steps(steps):
    """What has to hold of every step."""
    assert any(step.kept for step in steps)
    for step in steps:
        assert step.validation_loss_after <= step.validation_loss
        if step.kept:
            assert step.training_loss_after < step.training_loss and step.gain > step.standard_error


def test_kept_steps_lower_the_worst_groups_losses(boosted):
    trainer, metrics = boosted
    steps = trainer.run_directory.read(Boosting).steps
    check_steps(steps)
    assert [step.name for step in steps] == ["boost_0", "boost_1"] and steps[0].flops > 0
    groups, context = trainer.grouping.groups, trainer.flow.context
    before, after = trainer.run_directory.read(EnsembleWeights).weights, trainer.ensemble.weights
    train = {task: rows_of(context.train_table, {task: 1.0}) for task in TASKS}

    def losses(weights, tables):
        """Mean loss of each group."""
        trainer.ensemble.weights = weights
        scores = trainer.flow.evaluation.score_ensemble(trainer.ensemble, tables)
        trainer.ensemble.weights = after
        return {name: sum(scores[t].loss for t in tasks) / len(tasks) for name, tasks in groups.items()}

    # The first one is for the group with the highest training loss, which falls.
    first, training = steps[0], losses(before, train)
    assert first.target == max(training, key=training.get) and first.kept
    assert first.training_loss == pytest.approx(training[first.target], rel=1e-4)
    assert first.validation_loss == pytest.approx(losses(before, context.eval_tables)[first.target], rel=1e-4)
    boosted_training = losses(after, train)
    assert boosted_training[first.target] < training[first.target]
    # The second is for the one that is the worst then.
    training[first.target] = first.training_loss_after
    assert steps[1].target == max(training, key=training.get)
    for step in steps:
        assert step.tasks == groups[step.target]
    last = {step.target: step for step in steps}
    for step in last.values():
        expected = step.training_loss_after if step.kept else step.training_loss
        assert boosted_training[step.target] == pytest.approx(expected, rel=1e-4)
        found = sum(metrics[f"eval_{task}_loss"] for task in step.tasks) / len(step.tasks)
        assert found == pytest.approx(step.validation_loss_after if step.kept else step.validation_loss, rel=1e-4)


def test_steps_are_ordinary_members_that_load_generate_and_stand_in_the_card(boosted):
    trainer, _ = boosted
    ensemble, run = trainer.ensemble, trainer.run_directory
    step = run.read(Boosting).kept[0]
    task = step.tasks[0]
    assert {member.name for member in ensemble.members if member.is_step} >= {"boost_0", "start"}
    assert not {"boost_0", "start"} & set(ensemble.default_weights)
    ids = torch.randint(3, 20, (2, 6))
    with torch.no_grad():
        found = ensemble.eval()(input_ids=ids, task=task).logits
        single = {}
        for name in ensemble.adapter_names:
            ensemble.model.set_adapter(name, inference_mode=True)
            single[name] = ensemble.model(input_ids=ids).logits
    before = run.read(EnsembleWeights).weights[task]
    expected = ensemble.scales.get(task, 1.0) * sum(weight * single[name] for name, weight in before.items())
    for own in run.read(Boosting).kept:
        if task in own.tasks:
            expected = expected + own.weight * (single[own.name] - single["start"])
    assert torch.allclose(found, expected, atol=1e-3)
    loaded = PeftEnsembleModel.from_pretrained(run.ensemble)
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids, task=task).logits, found, atol=1e-4)
    assert [member.is_step for member in loaded.members] == [member.is_step for member in ensemble.members]
    loaded.fused = False
    generated = loaded.generate(ids, task=task, max_new_tokens=3)
    loaded.fused = True
    assert torch.equal(generated, loaded.generate(ids, task=task, max_new_tokens=3))
    # Rows of no task are routed to members that make sense alone.
    routed = loaded._routed_weights(None, "prompt", {"input_ids": ids})
    assert torch.allclose(routed.sum(1), torch.ones(2)) and not routed[:, -2:].any()
    card = (run.ensemble / "README.md").read_text()
    assert "**Boosting.**" in card and re.search(r"\| boost[^|]*0 \| [^|]* \| surrogate \|", card)
    with pytest.raises(EnsembleError, match="boosting steps are added to logits"):
        PeftEnsembleModel(loaded.model, loaded.members, combination="probs")


def test_a_killed_run_goes_on_and_a_finished_one_makes_no_step(boosted, tmp_path, base, monkeypatch):
    whole, _ = boosted
    calls = killed_in_a_call(monkeypatch, stage.EnsembleBoosting, "_step", 2)
    options = {"boosting_steps": 2, "projection_dim": None, **SHORT}
    with pytest.raises(KeyboardInterrupt):
        sft_trainer(tmp_path / "run", base, TASKS, **options).train()
    again = sft_trainer(tmp_path / "run", base, TASKS, **options)
    again.train()
    assert len(calls) == 3
    without = {"seconds": 0.0, "flops": 0.0}
    found = [
        [{**vars(own), **without} for own in trainer.run_directory.read(Boosting).steps] for trainer in (whole, again)
    ]
    assert found[0] == found[1] and again.ensemble.weights == whole.ensemble.weights
    for name in ("start", "boost_0"):
        files = [t.run_directory.member(name) / "adapter_model.safetensors" for t in (whole, again)]
        assert files[0].read_bytes() == files[1].read_bytes()
    monkeypatch.setattr(stage.EnsembleBoosting, "_step", lambda *args: pytest.fail("made again"))
    finished = sft_trainer(tmp_path / "run", base, TASKS, **options)
    finished.train()
    assert finished.ensemble.weights == whole.ensemble.weights


@pytest.mark.parametrize("method", [*LINEAR_METHODS, "finetuning"])
def test_steps_are_for_groups_that_go_on_from_the_adapter_for_all(tmp_path, base, method):
    options = {"num_groups": 1, "ensemble_weights": "own_group", "max_steps": 2, "group_initialization": "baseline"}
    few = {task: TASKS[task] for task in list(TASKS)[:2]}
    trainer = sft_trainer(tmp_path / "run", base, few, boosting_steps=1, boosting_method=method, **options)
    trainer.train()
    (step,) = trainer.run_directory.read(Boosting).steps
    assert step.method == method and step.validation_loss_after <= step.validation_loss
    # Steps are solved at the start, whose gradients are captured before anything is trained.
    stages = list(trainer.run_directory.record.stages)
    assert stages[0] == "gradients" and stages.count("gradients_at_baseline") == 1
    assert {name.split(":")[0] for name in stages} == {own.name for own in trainer.flow.stages()}


def test_a_small_room_holds_two_rows_of_each_task(boosted, monkeypatch):
    trainer, _ = boosted
    tables = trainer.flow.context.eval_tables
    monkeypatch.setattr(held_out, "_VALUES", 1)
    found = held_out.added_answers(trainer.flow.context, trainer.ensemble, {"boost_0": 1.0, "start": -1.0}, tables)
    assert [own.num_rows for own in found] == [2] * len(tables)


def test_a_step_within_the_noise_is_not_kept_and_its_group_is_left_alone(tmp_path, base, monkeypatch):
    monkeypatch.setattr(stage, "added_member", lambda *args: AddedMember(0.5, 1.0, 1.1, 0.01, 0.02))
    options = {**SHORT, **QUICK, "boosting_steps": 4, "boosting_target": "task"}
    trainer = sft_trainer(tmp_path / "run", base, TASKS, **options)
    trainer.train()
    run = trainer.run_directory
    steps = run.read(Boosting).steps
    assert sorted(step.target for step in steps) == sorted(TASKS) and not any(step.kept for step in steps)
    assert not any(member.is_step for member in trainer.ensemble.members)
    assert [path.name for path in (run.ensemble / "adapters").iterdir()] == trainer.ensemble.adapter_names
    assert "| 0.0100 (0.0200) | no |" in (run.ensemble / "README.md").read_text()


class Seen(TrainerCallback):
    def __init__(self):
        self.trainings = []

    def on_train_begin(self, args, *rest, **kwargs):
        self.trainings.append(args.output_dir.split("/")[-1])


@pytest.mark.parametrize("method", ["residuals", "adaboost"])
def test_trained_steps_are_ordinary_trainings(tmp_path, base, method):
    seen = Seen()
    options = {**SHORT, **QUICK, "boosting_steps": 1, "boosting_method": method}
    trainer = sft_trainer(tmp_path / "run", base, TASKS, callbacks=[seen], **options)
    trainer.train()
    check_steps(trainer.run_directory.read(Boosting).steps)
    assert seen.trainings[-1] == "boost_0" and trainer.run_directory.trained_adapter("boost_0").status == "done"
    assert [own.name for own in trainer.flow.trainings()][-1] == "boost_0"


@pytest.mark.parametrize("method", ["ridge", "finetuning"])
def test_classifiers_whose_head_is_the_adapters_own(tmp_path, method):
    model = toy.save_model(toy.bert(), tmp_path / "bert")
    options = {**QUICK, "boosting_steps": 1, "boosting_method": method, "num_train_epochs": 1, "learning_rate": 3e-3}
    trainer = text_trainer(tmp_path / "run", model, toy.text_tasks(24, 20), **options)
    metrics = trainer.train().metrics
    (step,) = trainer.run_directory.read(Boosting).steps
    assert step.validation_loss_after <= step.validation_loss
    expected = step.validation_loss_after if step.kept else step.validation_loss
    assert metrics["eval_mean_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_trained_step_goes_on_from_its_checkpoint(tmp_path, base):
    options = {**SHORT, **QUICK, "boosting_steps": 1, "boosting_method": "finetuning"}
    options |= {"save_strategy": "steps", "save_steps": 2}

    class Killer(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if args.output_dir.endswith("boost_0") and state.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sft_trainer(tmp_path / "run", base, TASKS, callbacks=[Killer()], **options).train()
    assert (tmp_path / "run" / "training" / "boost_0" / "checkpoint-2").is_dir()
    trainers = [sft_trainer(tmp_path / name, base, TASKS, **options) for name in ("run", "whole")]
    for trainer in trainers:
        trainer.train()
        check_steps(trainer.run_directory.read(Boosting).steps)
    files = [t.run_directory.member("boost_0") / "adapter_model.safetensors" for t in trainers]
    assert files[0].read_bytes() == files[1].read_bytes()


def beside(combined_with=("first", "start")):
    model = toy.with_lora(toy.llama())
    for number, name in enumerate((*combined_with, "own")):
        model.add_adapter(name, toy.lora())
        torch.manual_seed(number)
    toy.randomize(model)
    model.set_adapter("own")
    weights = {"a": {"first": 0.7}, "b": {"first": -0.4, "start": 1.0}}
    return model, PeftEnsembleModel(model, list(combined_with), weights)


def logits_of(model, name, ids):
    model.set_adapter(name)
    with torch.no_grad():
        found = model(input_ids=ids).logits
    model.set_adapter("own")
    return found


def test_the_loss_beside_an_ensemble_is_of_each_rows_own_ensemble_in_any_order():
    model, ensemble = beside()
    ids, tasks = torch.randint(3, 20, (4, 6)), ["a", "b", "b", "a"]
    first, start, own = (logits_of(model, name, ids) for name in ("first", "start", "own"))
    fixed = torch.stack([0.7 * first[i] if task == "a" else start[i] - 0.4 * first[i] for i, task in enumerate(tasks)])
    expected = F.cross_entropy((fixed + own - start)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    trainer = SimpleNamespace(model=model, batch_tasks=tasks, label_space=None)
    loss = BesideEnsembleLoss(ensemble, "start", "x")
    model.train()
    with loss.attached(trainer):
        output = model(input_ids=ids, labels=ids)
        fused = model(input_ids=ids, labels=ids, fused_lm_head=True)
        order = [2, 0, 3, 1]
        trainer.batch_tasks = [tasks[i] for i in order]
        permuted = model(input_ids=ids[order], labels=ids[order])
    assert model.training and output.loss.item() == pytest.approx(float(expected), rel=1e-4)
    assert -fused.log_probs.mean().item() == pytest.approx(float(expected), rel=1e-4)
    assert torch.allclose(permuted.logits, output.logits[order], atol=1e-4)
    output.loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved and all(".own." in name for name in moved)
    # Afterwards, the model's forward is its own again.
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, own, atol=1e-5)


def test_residuals_are_regressed_on_at_the_answer_tokens_alone():
    model, ensemble = beside()
    ids, tasks = torch.randint(3, 20, (3, 5)), ["a", "a", "b"]
    labels = ids.masked_fill(torch.tensor([[1, 1, 1, 0, 0]] * 3).bool(), -100)
    loss = BesideEnsembleLoss(ensemble, "start", "x", is_regression=True)
    trainer = SimpleNamespace(model=model, batch_tasks=tasks, loss_is_scaled_for_ga=False)
    with loss.attached(trainer), torch.no_grad():
        assert trainer.step_loss is loss
        model(input_ids=ids, labels=labels)
        errors = loss.of_tokens(None, labels, tasks, [])
    assert trainer.step_loss is None and not errors[:, :2].any()
    first, start, own = (logits_of(model, name, ids).log_softmax(-1) for name in ("first", "start", "own"))
    fixed = torch.stack([0.7 * first[0], 0.7 * first[1], start[2] - 0.4 * first[2]]).log_softmax(-1)
    for row in range(3):
        for position in (2, 3):
            p_own, p_start, p = (x[row, position, ids[row, position + 1]].exp() for x in (own, start, fixed))
            change = torch.log(p_own / (1 - p_own)) - torch.log(p_start / (1 - p_start))
            assert float(errors[row, position]) == pytest.approx(float((change - (1 - p)) ** 2), rel=1e-3, abs=1e-5)


def test_rows_are_weighed_by_their_ids_in_any_order():
    loss = RowWeightedLoss({("a", "0"): 2.0, ("a", "1"): 0.5, ("b", "0"): 1.0}, "x")
    losses = torch.tensor([[1.0, 3.0], [1.0, 1.0], [2.0, 0.0]])
    weighed = loss.of_tokens(losses, torch.zeros(3, 3), ["b", "a", "a"], ["0", "1", "0"])
    assert weighed.tolist() == [[1.0, 3.0], [0.5, 0.5], [4.0, 0.0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margin": lambda logits, labels: logits.mean((1, 2))}, "margin as a function"),
        ({"boosting_method": "finetuning", "packing": True}, "packing=True with boosting_method='finetuning'"),
        ({"boosting_method": "adaboost", "label_smoothing_factor": 0.1}, "which has a loss of its own"),
        ({"boosting_method": "residuals", "task_loss_weighting": "tasks"}, "which has a loss of its own"),
        ({"boosting_method": "residuals", "loss_type": "dft"}, "loss_type='dft' with boosting_method='residuals'"),
        ({"boosting_method": "finetuning", "loss_type": "dft"}, "it counts what is answered badly least"),
    ],
)
def test_what_cannot_be_boosted_is_refused_by_the_constructor(tmp_path, base, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        sft_trainer(tmp_path / "run", base, TASKS, **{"boosting_steps": 1, **changes})
    assert not (tmp_path / "run" / "run.json").exists()


def test_copies_of_the_model_on_several_gpus_are_refused():
    model = toy.with_lora(toy.llama())
    args = SimpleNamespace(boosting_method="finetuning", n_gpu=2)
    with pytest.raises(ConfigurationError, match="on 2 GPUs in one process.*CUDA_VISIBLE_DEVICES=0"):
        check_boosted_model(model, args)
    for allowed in ({"n_gpu": 1}, {"boosting_method": "adaboost"}):
        check_boosted_model(model, SimpleNamespace(**{**vars(args), **allowed}))


def test_boosting_belongs_to_the_choices_of_a_run(boosted, base):
    record = json.loads((boosted[0].run_directory.path / "run.json").read_text())
    assert record["choices"]["boosting_steps"] == 2 and "boosting_steps" not in record["configuration"]["arguments"]
