"""Ensembles of causal language models: what a run leaves, and what it reports."""

import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from helpers import toy
from helpers.trainers import SMALL, sft_trainer, without_speed
from hf_ensemble import (
    PeftEnsembleModel,
    TaskSet,
)
from hf_ensemble.ensemble import fit_ensemble
from hf_ensemble.errors import TaskError
from hf_ensemble.runs import EnsembleWeights


def test_run_leaves_the_artefacts_it_promises(finished):
    trainer, output, _ = finished
    run = trainer.run_directory.path
    record = json.loads((run / "run.json").read_text())
    assert {name for name, stage in record["stages"].items() if stage["status"] == "done"} == {
        "gradients",
        "baseline",
        "group",
        "adapter:group_0",
        "adapter:group_1",
        "weights",
        "evaluation:eval",
    }
    names = ["tasks.json", "groups.json", "evaluation.json", "baseline/adapter_model.safetensors"]
    names += [f"estimate/{name}.json" for name in ("estimate", "weights")]
    names += [f"ensemble/{n}" for n in ("README.md", "ensemble_config.json", "assets/affinity.png")]
    names += [f"ensemble/adapters/{n}/adapter_model.safetensors" for n in trainer.ensemble.adapter_names]
    assert set(trainer.ensemble.adapter_names) - {"baseline"} == {"group_0", "group_1"}
    assert [name for name in names if not (run / name).is_file()] == []
    # Beside the groups' locks.
    trained = sorted(path.name for path in (run / "training").glob("[!.]*"))
    assert trained == ["baseline.json", "group_0.json", "group_1.json"]
    assert len(list((run / "scored_runs").glob("*.json"))) == 1
    assert not list(run.rglob("*.tmp"))
    assert output.global_step > 0 and output.metrics["eval_mean_accuracy"] == trainer.evaluate()["eval_mean_accuracy"]


def test_every_task_is_reported_for_ensemble_and_baseline(finished):
    trainer, output, _ = finished
    for task in trainer.tasks:
        for system in ("", "baseline_"):
            assert output.metrics[f"eval_{system}{task}_loss"] > 0
            assert 0 <= output.metrics[f"eval_{system}{task}_accuracy"] <= 1


def test_reported_loss_equals_a_plain_forward_per_example(finished):
    trainer, output, _ = finished
    losses = []
    for row in trainer.eval_dataset["diffs"]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = trainer.ensemble.eval()(input_ids=ids, task="diffs").logits
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]))
    assert output.metrics["eval_diffs_loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


def test_members_are_plain_trainings_of_their_group_alone(finished, tmp_path):
    """Each adapter equals what a plain SFTTrainer makes of its group's rows from the same start."""
    trainer, _, base = finished
    run = trainer.run_directory.path
    tasks = TaskSet.from_datasets(toy.sft_tasks())
    for name, members in trainer.grouping.groups.items():
        model = AutoModelForCausalLM.from_pretrained(base)
        plain = SFTTrainer(
            model=model,
            args=SFTConfig(output_dir=str(tmp_path / name), bf16=False, gradient_checkpointing=False, **SMALL),
            train_dataset=tasks.subset(members).table("train"),
            processing_class=toy.tokenizer(),
            peft_config=toy.lora(),
        )
        plain.train()
        expected = {n: p for n, p in plain.model.named_parameters() if "lora_" in n}
        ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "ensemble/adapters" / name)
        found = dict(ours.named_parameters())
        assert all(torch.allclose(found[n], p, atol=1e-6) for n, p in expected.items())


def test_the_model_is_what_serves_and_reloaded_ensemble_agrees(finished):
    trainer, _, _ = finished
    run = trainer.run_directory.path
    assert trainer.model is trainer.ensemble
    loaded = PeftEnsembleModel.from_pretrained(run / "ensemble")
    ids = torch.randint(3, 20, (3, 6))
    with torch.no_grad():
        expected = trainer.ensemble.eval()(input_ids=ids, task=list(trainer.tasks)).logits
        assert torch.allclose(loaded(input_ids=ids, task=list(trainer.tasks)).logits, expected, atol=1e-5)


def test_weights_are_no_worse_than_the_mean_of_what_they_are_made_of(finished):
    """On rows that they were not fitted to: the loss is convex in the weights."""
    trainer, output, _ = finished
    record = trainer.run_directory.read(EnsembleWeights)
    for task in trainer.tasks:
        losses, shares = record.cross_validated[task], record.shares[task]
        mean = sum(share * losses[name] for name, share in shares.items())
        assert losses["chosen"] <= mean + 1e-9
        # Every adapter's scale is near 1 for so few rows, and the best candidate has the largest share.
        assert losses["adapter baseline"] == pytest.approx(output.metrics[f"eval_baseline_{task}_loss"], rel=0.05)
        assert losses["own"] == losses[f"adapter {trainer.grouping.group_of(task)}"]
        assert losses[max(shares, key=shares.get)] == min(losses[name] for name in shares)
        assert output.metrics[f"eval_{task}_loss"] == pytest.approx(record.losses[task]["fitted"], rel=1e-4)


def test_fitted_weights_are_no_worse_than_the_own_group_or_the_baseline(finished):
    """On the rows that they were fitted to."""
    trainer, output, _ = finished
    own = {task: {trainer.grouping.group_of(task): 1.0} for task in trainer.tasks}
    fit = fit_ensemble(
        trainer.ensemble, trainer.eval_dataset, data_collator=trainer.data_collator, cross_validate=False
    )
    fitted = {task: fit.weights_of(found) for task, found in fit.tasks.items()}
    kept = trainer.ensemble.weights, trainer.ensemble.scales
    trainer.ensemble.scales, losses = {}, {}
    for name, weights in (("own", own), ("fitted", fitted)):
        trainer.ensemble.weights = weights
        losses[name] = trainer.evaluate()
    trainer.ensemble.weights, trainer.ensemble.scales = kept
    trainer.evaluate()
    for task in trainer.tasks:
        others = losses["own"][f"eval_{task}_loss"], output.metrics[f"eval_baseline_{task}_loss"]
        assert losses["fitted"][f"eval_{task}_loss"] <= min(others) + 1e-5


def test_evaluating_other_rows(finished):
    trainer, _, _ = finished
    rows = {"sums": Dataset.from_list(toy.sum_rows(5, 9))}
    metrics = trainer.evaluate(rows, metric_key_prefix="test")
    as_lists = trainer.evaluate({"sums": toy.sum_rows(5, 9)}, metric_key_prefix="test")
    assert without_speed(as_lists) == without_speed(metrics)
    assert "test_sums_loss" in metrics and "test_baseline_sums_accuracy" in metrics
    with pytest.raises(TaskError, match="Unknown tasks"):
        trainer.evaluate({"other": rows["sums"]})


def test_one_group_of_everything_is_the_baseline(tmp_path, base_folder):
    trainer = sft_trainer(tmp_path / "run", base_folder, num_groups=1, num_train_epochs=1)
    metrics = trainer.train().metrics
    assert trainer.ensemble.adapter_names == ["group_0"]
    assert metrics["eval_mean_loss"] == pytest.approx(metrics["eval_baseline_mean_loss"])
    assert [p.name for p in (tmp_path / "run" / "training").glob("[!.]*")] == ["baseline.json"]


def test_without_baseline(tmp_path, base_folder):
    trainer = sft_trainer(
        tmp_path / "run",
        base_folder,
        num_groups=2,
        train_baseline=False,
        calibration_runs=0,
        ensemble_weights="own_group",
    )
    metrics = trainer.train().metrics
    assert not any("baseline" in key for key in metrics)
    assert not (tmp_path / "run" / "baseline").exists()
    assert all(list(row.values()) == [1.0] for row in trainer.ensemble.weights.values())
    estimate = json.loads((tmp_path / "run" / "estimate" / "estimate.json").read_text())
    assert estimate["l2_evidence"] == "replay"
