"""Runs that are scored, and choose, by the answers that are generated."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from helpers import toy
from helpers.trainers import killed_in_a_call, sft_config, split, text_trainer
from hf_ensemble import (
    AnswerMetric,
    EnsembleSFTTrainer,
    PeftEnsembleModel,
    SelectionSFTConfig,
    SelectionSFTTrainer,
    applied_update,
    collect_results,
)
from hf_ensemble.errors import ConfigurationError, TaskError
from hf_ensemble.evaluate import AnswerEvaluator
from hf_ensemble.runs import EnsembleWeights, Evaluation
from hf_ensemble.store import GradientStore
from hf_ensemble.train.task_trainer import TaskSFTTrainer


def mean_number(predictions, references):
    return {"mean_number": float(np.mean([float(text or -1) for text in predictions]))}


METRIC = AnswerMetric("last_number", ("exact_match", mean_number), max_new_tokens=4)


def trainer_of(folder, base, trainer_class=EnsembleSFTTrainer, metrics=METRIC, tasks=None, **changes):
    tasks = tasks or toy.sft_tasks()
    is_selection = trainer_class is SelectionSFTTrainer
    changes = {"num_groups": 2, "num_train_epochs": 1, **changes} if not is_selection else changes
    return trainer_class(
        model=base,
        args=sft_config(folder, **({"config_class": SelectionSFTConfig} if is_selection else {}), **changes),
        train_dataset=split(tasks, "train"),
        eval_dataset=split(tasks, "validation"),
        peft_config=toy.lora(),
        answer_metrics=metrics,
        **({"target": "sums"} if is_selection else {}),
    )


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A finished ensemble run, whose base answers with numbers."""
    folder = tmp_path_factory.mktemp("answered")
    base = toy.save_model(toy.llama(initializer_range=0.3), folder / "base")
    trainer = trainer_of(folder / "run", base)
    return trainer, trainer.train().metrics, base


def test_every_system_is_scored_by_what_it_answers(answered, tmp_path):
    trainer, metrics, base = answered
    ensemble = PeftEnsembleModel.from_pretrained(trainer.run_directory.ensemble).eval()
    tokenizer = toy.tokenizer()
    for task, splits in toy.sft_tasks().items():
        right, numbers = [], []
        for row in splits["validation"]:
            prompt = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
            new = ensemble.generate(prompt, task=task, do_sample=False, max_new_tokens=4)[0, prompt.shape[1] :]
            words = tokenizer.decode(new, skip_special_tokens=True).split()
            found = [word for word in words if word.isdigit()]
            right.append(found[-1:] == row["completion"].split()[:1])
            numbers.append(float(found[-1]) if found else -1.0)
        assert max(numbers) >= 0, "the model answers without numbers: nothing would be compared"
        assert metrics[f"eval_{task}_exact_match"] == pytest.approx(np.mean(right))
        assert metrics[f"eval_{task}_mean_number"] == pytest.approx(np.mean(numbers))
        assert f"eval_baseline_{task}_exact_match" in metrics
    assert metrics["eval_mean_exact_match"] == pytest.approx(
        np.mean([metrics[f"eval_{task}_exact_match"] for task in toy.sft_tasks()])
    )
    kept = trainer.run_directory.read(Evaluation).scores["eval"]
    assert kept["baseline"]["sums"].metrics["mean_number"] == metrics["eval_baseline_sums_mean_number"]
    results = collect_results(trainer)
    assert set(results.mean_metrics) == {"base", "baseline", "ensemble"}
    assert results.mean_metrics["ensemble"]["exact_match"] == pytest.approx(metrics["eval_mean_exact_match"])
    for by_task in results.scores.values():
        assert all(set(own.metrics) == {"exact_match", "mean_number"} for own in by_task.values())
    card = ModelCard.load(trainer.run_directory.ensemble / "README.md")
    titles = [table.title for table in results.tables()]
    assert "mean_number on evaluation rows" in titles
    for table in results.tables():
        assert all(" | ".join(row[1:]) in card.text for row in table.rows)
    kinds = {result.metric_type for result in card.data.eval_results}
    assert kinds == {"loss", "accuracy", "exact_match", "mean_number"}


def test_scored_again_for_other_rows_and_some_tasks(answered):
    trainer, _, base = answered
    metrics = trainer.evaluate({"sums": toy.sum_rows(3, 9)}, metric_key_prefix="test")
    assert metrics["test_sums_mean_number"] == metrics["test_mean_mean_number"]
    some = trainer_of(trainer.run_directory.path, base, metrics={"diffs": METRIC})
    metrics = some.train().metrics
    assert "eval_diffs_exact_match" in metrics and "eval_sums_exact_match" not in metrics


def test_a_run_killed_between_two_scorings_ends_with_the_same_scores(answered, tmp_path, monkeypatch):
    _, whole, base = answered
    killed_in_a_call(monkeypatch, AnswerEvaluator, "score_tasks", 2)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path / "run", base).train()
    monkeypatch.setattr(TaskSFTTrainer, "train", lambda *a, **k: pytest.fail("trained again"))
    metrics = trainer_of(tmp_path / "run", base).train().metrics
    assert {name: value for name, value in metrics.items() if name.endswith(("match", "number"))} == {
        name: value for name, value in whole.items() if name.endswith(("match", "number"))
    }


def test_weights_are_those_with_the_best_answers(answered, tmp_path):
    _, _, base = answered
    trainer = trainer_of(
        tmp_path / "run",
        base,
        metrics={"sums": AnswerMetric("last_number", mean_number, 4), "diffs": METRIC},
        ensemble_weights="answers",
    )
    metrics = trainer.train().metrics
    record = trainer.run_directory.read(EnsembleWeights)
    assert set(record.answered) == {"sums", "diffs"} and set(record.weights) == {"sums", "diffs", "more_sums"}
    found = record.answered["sums"]
    assert set(found) == {"fitted", "own_group", "one_hot", "uniform"}
    assert metrics["eval_sums_mean_number"] == pytest.approx(max(found.values()))
    assert trainer.run_directory.record.choices["answer_metrics"]["sums"]["metrics"] == ["mean_number"]


def test_a_selection_by_answers_generates_at_predicted_parameters(answered, tmp_path, monkeypatch):
    _, _, base = answered
    seen, score = [], AnswerEvaluator.score_tasks

    def spied(self, generate, tables, description):
        if description == "Verifying a candidate":
            seen.append({name: p.detach().clone() for name, p in self.model.named_parameters() if "lora_" in name})
        return score(self, generate, tables, description)

    monkeypatch.setattr(AnswerEvaluator, "score_tasks", spied)
    changes = {"projection_dim": None, "selection_metric": "answers", "max_verified": 3, "calibration_runs": 0}
    metric = AnswerMetric("last_number", (mean_number, "exact_match"), max_new_tokens=4)
    trainer = trainer_of(tmp_path / "run", base, SelectionSFTTrainer, metric, **changes)
    metrics = trainer.train().metrics
    assert metrics["eval_mean_number"] == metrics["eval_sums_mean_number"]
    path = trainer.selection.path
    assert [step["added"] for step in path] == trainer.selection.tasks and len(seen) == 3
    if len(path) > 1:
        assert path[1]["answered"] == max(path[1]["verified"].values()) >= path[0]["answered"]
    # What was answered first: the target alone, by its predicted parameters.
    fresh = trainer_of(tmp_path / "fresh", base, SelectionSFTTrainer, metric, **changes)
    estimator = trainer.selector().estimator
    alone = estimator.predict_subsets([["sums"]]).coefficients[0]
    store = GradientStore(trainer.run_directory.gradients)
    with applied_update(fresh.model, store, estimator.parameters_at(alone)):
        own = {name: p for name, p in fresh.model.named_parameters() if "lora_" in name}
        assert own and all(torch.allclose(own[name], value, atol=1e-6) for name, value in seen[0].items())
    again = trainer_of(tmp_path / "run", base, SelectionSFTTrainer, metric, **changes).train().metrics
    assert len(seen) == 3 and again["eval_mean_number"] == metrics["eval_mean_number"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["choices"]["answer_metric"]["metrics"] == ["mean_number", "exact_match"]


@pytest.mark.parametrize(
    ("trainer_class", "metrics", "changes", "message"),
    [
        (EnsembleSFTTrainer, {"x": METRIC}, {}, r"unknown tasks \['x'\]"),
        (EnsembleSFTTrainer, "the_answer_is", {}, "Task 'sums', example .* finds no final answer in the right text"),
        (EnsembleSFTTrainer, None, {"ensemble_weights": "answers"}, "there are no answer_metrics"),
        (SelectionSFTTrainer, {"diffs": METRIC}, {"selection_metric": "answers"}, "has no entry for 'sums'"),
        (SelectionSFTTrainer, METRIC, {"selection_metric": "answers"}, "found projection_dim=128. Set projection_dim"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_anything_is_trained(
    tmp_path, base_folder, trainer_class, metrics, changes, message
):
    with pytest.raises((ConfigurationError, TaskError), match=message):
        trainer_of(tmp_path / "run", base_folder, trainer_class, metrics, **changes)
    assert not (tmp_path / "run" / "run.json").exists()


def test_rows_that_are_answers_throughout_and_classifiers_are_refused_by_name(tmp_path, base_folder):
    row = {"input_ids": [4, 5, 6], "labels": [4, 5, 6]}
    tasks = {**toy.sft_tasks(), "plain": {"train": [row] * 4, "validation": [row] * 2}}
    with pytest.raises(TaskError, match="Task 'plain', example .*: expected a prompt before the answer"):
        trainer_of(tmp_path / "run", base_folder, tasks=tasks, metrics="whole_text", num_groups=None)
    with pytest.raises(ConfigurationError, match="EnsembleTrainer was given text with labels"):
        text_trainer(tmp_path / "run", toy.bert(4), toy.text_tasks(), answer_metrics=METRIC)
