"""What a run over several datasets ends with: figures, state, model, predictions and metrics, as its parent's do."""

import json
from html import unescape

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import TrainerCallback

from helpers import toy
from helpers.trainers import sft_config, sft_trainer, split, text_trainer, without_speed
from hf_ensemble import (
    EnsembleSFTTrainer,
    PeftEnsembleModel,
    SelectionConfig,
    SelectionTrainer,
    collect_results,
)
from hf_ensemble.errors import ConfigurationError, TaskError
from hf_ensemble.runs import Estimate, EvaluatedRows, ExampleRows, Results
from hf_ensemble.train.task_trainer import TaskSFTTrainer

FIGURES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss"}
LOGS = {"logging_strategy": "steps", "logging_steps": 2, "num_groups": 2, "num_train_epochs": 1}


class Seen(TrainerCallback):
    """What a callback of the user's is told of evaluations."""

    def __init__(self):
        self.evaluated, self.predicted = [], []

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.evaluated.append(metrics)

    def on_predict(self, args, state, control, metrics=None, **kwargs):
        self.predicted.append(metrics)


def token_accuracy(prediction):
    """Of predicted tokens, logits or their largest, that are aligned with labels as in a language model."""
    predicted = prediction.predictions
    found = (predicted.argmax(-1) if predicted.ndim == 3 else predicted)[:, :-1]
    counts = prediction.label_ids[:, 1:] != -100
    return {"tokens": float((found == prediction.label_ids[:, 1:])[counts].mean())}


def label_accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A finished run with logs and metrics, how often its metrics were computed, and its callback."""
    folder = tmp_path_factory.mktemp("logged")
    base, seen, tasks = toy.save_model(toy.llama(), folder / "base"), Seen(), toy.sft_tasks()
    trainer = EnsembleSFTTrainer(
        model=base,
        args=sft_config(folder / "run", **LOGS),
        train_dataset=split(tasks, "train"),
        eval_dataset=split(tasks, "validation"),
        peft_config=toy.lora(),
        callbacks=[seen],
        compute_metrics=token_accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    return trainer, trainer.train(), seen, before


def test_the_last_entry_of_the_log_is_that_of_a_training(logged):
    trainer, output, _, _ = logged
    trainings = trainer.run_directory.trainings()
    last = trainer.state.log_history[-1]
    assert set(last) >= FIGURES and set(output.metrics) >= FIGURES and "adapter" not in last
    assert "eval_loss" in trainer.state.log_history[-2]
    steps = [own.global_step for own in trainings]
    assert len(trainings) == 3 and min(steps) > 0
    assert last["step"] == output.global_step == trainer.state.global_step == trainer.state.max_steps == sum(steps)
    assert last["total_flos"] == trainer.state.total_flos == sum(own.total_flos for own in trainings) > 0
    expected = sum(own.training_loss * own.global_step for own in trainings) / sum(steps)
    assert last["train_loss"] == output.training_loss == pytest.approx(expected)
    assert last["epoch"] == trainer.state.epoch == output.metrics["epoch"] == 3
    ends = [own.log_history[-1] for own in trainings]
    assert last["train_runtime"] == pytest.approx(sum(end["train_runtime"] for end in ends), abs=1e-3)
    assert last["train_samples_per_second"] * last["train_runtime"] == pytest.approx(72, rel=0.01)


def test_the_log_goes_on_over_the_trainings(logged):
    trainer, _, _, _ = logged
    entries = [entry for entry in trainer.state.log_history if "adapter" in entry]
    assert list(dict.fromkeys(entry["adapter"] for entry in entries)) == ["baseline", "group_0", "group_1"]
    for key in ("step", "epoch"):
        values = [entry[key] for entry in entries]
        assert values == sorted(values) and values[-1] == trainer.state.log_history[-1][key]
    counted = [entry["num_tokens"] for entry in entries if "num_tokens" in entry]
    assert counted == sorted(counted) and counted[-1] > 2 * counted[2]


def test_a_run_that_was_finished_before_reports_the_same(logged, monkeypatch, tmp_path):
    trainer, output, _, _ = logged
    monkeypatch.setattr(TaskSFTTrainer, "train", lambda *a, **k: pytest.fail("trained again"))
    base = trainer.ensemble.base_model_reference.name_or_path
    again = sft_trainer(trainer.args.output_dir, base, **LOGS, save_report=True)
    said = []
    for module in ("flow_trainer", "flows.stages"):
        monkeypatch.setattr(f"hf_ensemble.train.{module}.announce", lambda text, with_bars: said.append(text))
    metrics = again.train().metrics
    page = again.run_directory.report
    assert said == ["Stage 6 of 6: evaluation", f"Report: {page}", again.report().verdict]
    assert again.report().verdict in unescape(page.read_text())
    assert {key: metrics[key] for key in FIGURES} == {key: output.metrics[key] for key in FIGURES}
    kept = [[entry for entry in own.state.log_history if "adapter" in entry] for own in (trainer, again)]
    assert kept[0] == kept[1] and again.state.epoch == trainer.state.epoch
    # As at the end of a script.
    again.save_state()
    again.save_metrics("train", metrics)
    again.log_metrics("train", metrics)
    folder = trainer.run_directory.path
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == output.global_step
    assert json.loads((folder / "all_results.json").read_text())["train_loss"] == output.training_loss


def test_metrics_are_computed_of_every_system_and_task(logged):
    trainer, output, seen, _ = logged
    metrics = output.metrics
    names = list(trainer.tasks)
    for start in ("eval", "eval_baseline"):
        found = [metrics[f"{start}_{task}_tokens"] for task in names]
        assert metrics[f"{start}_mean_tokens"] == pytest.approx(np.mean(found))
    assert metrics["eval_tokens"] == metrics["eval_mean_tokens"]
    assert metrics["eval_loss"] == metrics["eval_mean_loss"]
    assert {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"} <= set(metrics)
    assert seen.evaluated[0]["eval_loss"] == metrics["eval_loss"] and len(seen.evaluated) == 1
    for task in names:
        right = total = 0
        for row in trainer.eval_dataset[task]:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
            with torch.no_grad():
                found = trainer.model.eval()(input_ids=ids, task=task).logits[0, :-1].argmax(-1)
            right += int((found == labels).sum())
            total += int((labels != -100).sum())
        assert metrics[f"eval_{task}_tokens"] == pytest.approx(right / total)
    trainer.evaluate()
    results = collect_results(trainer)
    assert results == trainer.report()
    assert results.scores["base"]["sums"].metrics["tokens"] < results.scores["ensemble"]["sums"].metrics["tokens"]
    assert (
        trainer.run_directory.read(Results).mean_metrics["baseline"]["tokens"] == metrics["eval_baseline_mean_tokens"]
    )
    card = (trainer.run_directory.ensemble / "README.md").read_text()
    assert "tokens on evaluation rows:" in card and "type: tokens" in card
    for table in results.tables():
        assert all(" | ".join(row[1:]) in card for row in table.rows)


def test_a_page_that_fails_stops_nothing(logged, monkeypatch, caplog):
    trainer, _, _, _ = logged
    monkeypatch.setattr(trainer.args, "save_report", True)
    monkeypatch.setattr("hf_ensemble.train.flow_trainer.write_report", lambda path: 1 / 0)
    assert collect_results(trainer).verdict
    assert "could not be written: ZeroDivisionError" in caplog.text and "hf-ensemble report" in caplog.text


def test_the_rows_that_help_most_and_least_are_kept_with_their_text(logged):
    trainer, _, _, _ = logged
    shown = trainer.run_directory.read(ExampleRows)
    assert set(shown.targets) == set(shown.tasks) == set(trainer.tasks)
    texts = {
        (row["task"], row["example_id"]): trainer.processing_class.decode(row["input_ids"], skip_special_tokens=True)
        for row in trainer.train_dataset
    }
    for task, rows in shown.tasks.items():
        assert rows.num_rows == 12 and rows.quantiles == sorted(rows.quantiles)
        for row in (*rows.lowest, *rows.highest):
            assert row.text == texts[task, row.example_id]
        assert rows.lowest[0].score == rows.quantiles[0] and rows.highest[0].score == rows.quantiles[-1]


def test_a_run_ends_with_its_verdict_and_intervals(logged):
    trainer, output, _, _ = logged
    results, run = trainer.report(), trainer.run_directory
    assert results.verdict and str(results).startswith(results.verdict) and results.reference == "baseline"
    rows = run.read(EvaluatedRows).rows["eval"]
    for system, by_task in results.scores.items():
        prefix = "eval" if system == "ensemble" else f"eval_{system}"
        for task, own in by_task.items():
            assert np.mean(rows[system][task].loss) == pytest.approx(own.loss, rel=1e-5)
            assert output.metrics[f"{prefix}_{task}_loss"] == own.loss
            low, high = results.intervals[system].tasks[task]["loss"]
            assert low <= own.loss <= high
    gained = results.mean_loss["ensemble"] - results.mean_loss["baseline"]
    assert results.intervals["ensemble"].mean_difference["loss"].value == pytest.approx(gained, abs=1e-4)
    predicted = run.read(Estimate).predicted_loss
    assert results.predicted_loss == {task: predicted[trainer.grouping.group_of(task)][task] for task in trainer.tasks}
    assert set(run.read(Estimate).left_out) == set(trainer.tasks)


def test_the_model_is_the_ensemble_and_knows_the_names_of_before(logged):
    trainer, _, _, before = logged
    assert trainer.model is trainer.ensemble and set(trainer.model.model_tags) == {"trl", "sft", "hf-ensemble"}
    changed = {name for name, value in before.items() if not torch.equal(trainer.model.get_parameter(name), value)}
    assert changed == {name for name in before if "lora_" in name}
    assert trainer.model.get_submodule("base_model") is trainer.model.model.base_model
    with pytest.raises(AttributeError):
        trainer.model.get_parameter("nowhere.weight")
    with pytest.raises(ConfigurationError, match=r"found a PeftEnsembleModel. Pass its PeftModel, ensemble.model"):
        sft_trainer("nowhere", trainer.model)
    # The adapter of the user's own is the one for all tasks.
    parameters = dict(trainer.model.model.named_parameters())
    pairs = [(p, parameters[n.replace(".default.", ".baseline.")]) for n, p in parameters.items() if ".default." in n]
    if "baseline" in trainer.ensemble.adapter_names:
        assert pairs and all(torch.equal(*pair) for pair in pairs)


def test_further_calls_work_on_the_same_run(logged, monkeypatch):
    trainer, output, _, _ = logged
    monkeypatch.setattr(TaskSFTTrainer, "train", lambda *a, **k: pytest.fail("trained again"))
    trainer.capture()
    trainer.selector()
    again = trainer.train()
    assert without_speed(again.metrics) == pytest.approx(without_speed(output.metrics))
    assert trainer.model is trainer.ensemble
    assert without_speed(trainer.evaluate())["eval_loss"] == pytest.approx(output.metrics["eval_loss"])


def test_predictions_are_the_ensembles(logged):
    trainer, _, seen, _ = logged
    rows = {"sums": Dataset.from_list(toy.sum_rows(3, 9)), "diffs": Dataset.from_list(toy.sum_rows(4, 9, "diff"))}
    trainer.preprocess_logits_for_metrics = None
    output = trainer.predict(rows)
    trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
    assert output.predictions.shape[:2] == output.label_ids.shape and len(output.label_ids) == 7
    tables = trainer.prepare_rows(rows)
    number = 0
    for task, table in tables.items():
        for row in table:
            length = len(row["input_ids"])
            with torch.no_grad():
                logits = trainer.model.eval()(input_ids=torch.tensor([row["input_ids"]]), task=task).logits[0]
            assert np.allclose(output.predictions[number, :length], logits.numpy(), atol=1e-4)
            assert output.label_ids[number].tolist() == row["labels"] + [-100] * (len(output.label_ids[0]) - length)
            number += 1
    metrics = output.metrics
    assert metrics["test_loss"] == pytest.approx((metrics["test_sums_loss"] + metrics["test_diffs_loss"]) / 2)
    assert {"test_sums_tokens", "test_tokens", "test_runtime"} <= set(metrics) and seen.predicted[-1] is metrics
    # One dataset that says which task each row has; the trainer's own tables do, too.
    together = concatenate_datasets([table.add_column("task", [name] * len(table)) for name, table in rows.items()])
    assert np.array_equal(trainer.predict(together).label_ids, output.label_ids)
    own = trainer.predict(trainer.eval_dataset["sums"], metric_key_prefix="own")
    assert own.predictions.shape == own.label_ids.shape and "own_sums_loss" in own.metrics
    with pytest.raises(
        TaskError, match=r"^Expected a dict with the rows of each task, such as \{'sums': rows\}, or one"
    ):
        trainer.predict(rows["sums"])


def test_evaluation_takes_what_its_parent_takes(logged):
    trainer, output, _, _ = logged
    by_name = trainer.evaluate("sums", metric_key_prefix="test")
    assert by_name["test_sums_loss"] == pytest.approx(output.metrics["eval_sums_loss"])
    together = concatenate_datasets([trainer.eval_dataset[task] for task in trainer.tasks])
    found = without_speed(trainer.evaluate(together))
    assert found == pytest.approx({key: output.metrics[key] for key in found})
    with pytest.raises(TaskError, match="found one dataset with the columns"):
        trainer.evaluate(Dataset.from_list(toy.sum_rows(2)))
    with pytest.raises(TaskError, match="^Unknown task 'more'"):
        trainer.evaluate("more")


def test_a_saved_model_has_what_the_parent_saves(logged, tmp_path):
    trainer, _, _, _ = logged
    trainer.model.add_model_tags("mine")
    trainer.save_model(str(tmp_path / "saved"))
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"README.md", "ensemble_config.json", "adapters", "tokenizer.json", "training_args.bin"} <= names
    saved = torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False)
    assert type(saved) is type(trainer.args) and saved.hub_token is None
    loaded = PeftEnsembleModel.from_pretrained(tmp_path / "saved")
    assert set(loaded.model_tags) == {"trl", "sft", "hf-ensemble", "mine"}
    card = (tmp_path / "saved" / "README.md").read_text()
    assert all(f"\n- {tag}\n" in card for tag in ("trl", "sft", "mine", "hf-ensemble", "ensemble"))
    trainer.create_model_card(tags=["yours"], language="en", dataset_name="sums")
    card = (trainer.run_directory.ensemble / "README.md").read_text()
    assert "\n- yours\n" in card and "\nlanguage: en\n" in card and "\ndatasets:\n- sums\n" in card


def test_tags_are_there_before_training(tmp_path, base_folder):
    assert set(sft_trainer(tmp_path / "run", base_folder).model.model_tags) == {"trl", "sft", "hf-ensemble"}


def test_metrics_by_batches_equal_those_of_all_rows(logged, monkeypatch):
    """`batch_eval_metrics` keeps the logits of one batch; what it comes to is the same."""

    class Counter:
        right = total = largest = 0

        def __call__(self, prediction, compute_result=True):
            counts = prediction.label_ids[:, 1:] != -100
            found = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
            self.right, self.total = self.right + int(found[counts].sum()), self.total + int(counts.sum())
            self.largest = max(self.largest, len(prediction.label_ids))
            result = {"tokens": self.right / self.total}
            if compute_result:
                self.right = self.total = 0
            return result

    trainer, output, _, _ = logged
    counter = Counter()
    monkeypatch.setattr(trainer, "compute_metrics", counter)
    for name, value in (("batch_eval_metrics", True), ("per_device_eval_batch_size", 4)):
        monkeypatch.setattr(trainer.args, name, value)
    found = without_speed(trainer.evaluate())
    assert found == pytest.approx({key: output.metrics[key] for key in found}) and counter.largest == 4


@pytest.mark.parametrize("target", [None, "films"])
def test_a_classifier_predicts_rows_without_labels(tmp_path, target):
    kind = {} if target is None else {"trainer_class": SelectionTrainer, "config": SelectionConfig, "target": target}
    changes = {"num_groups": 2} if target is None else {"max_auxiliary": 1}
    tasks = toy.text_tasks()
    trainer = text_trainer(tmp_path / "run", toy.bert(4), tasks, **kind, **changes, compute_metrics=label_accuracy)
    metrics = trainer.train().metrics
    scores = trainer.scores()["ensemble" if target is None else "selection"]
    # The metric of the same name is the user's own.
    assert all(metrics[f"eval_{task}_accuracy"] == scores[task].metrics["accuracy"] for task in tasks)
    rows = {task: Dataset.from_list(splits["validation"]) for task, splits in tasks.items()}
    whole = trainer.predict(rows)
    assert whole.metrics["test_films_accuracy"] == metrics["eval_films_accuracy"]
    hidden = {task: own.remove_columns("label") for task, own in rows.items()}
    hidden["films"] = hidden["films"].add_column("label", [-1] * len(hidden["films"]))
    bare = trainer.predict(hidden)
    assert bare.label_ids is None and "test_loss" not in bare.metrics
    assert np.allclose(bare.predictions, whole.predictions)
    # A row's answer is one of its task's own labels.
    own = trainer.tasks.label_space.mask([task for task, table in rows.items() for _ in table]).numpy()
    assert own[np.arange(len(own)), bare.predictions.argmax(-1)].all()
    if target is not None:
        assert metrics["eval_accuracy"] == metrics["eval_films_accuracy"]
        assert metrics["eval_loss"] == metrics["eval_films_loss"]
        assert set(trainer.state.log_history[-1]) >= FIGURES
        trainer.save_model()
        trainer.create_model_card(model_name="mine")
        names = {path.name for path in (tmp_path / "run").iterdir()}
        assert {"adapter_model.safetensors", "training_args.bin", "tokenizer.json", "README.md"} <= names


def test_trainings_on_all_rows_report_one_evaluation(tmp_path, base_folder):
    """Without an adapter there is one training, whose evaluation is one entry of the log."""
    seen, tasks = Seen(), toy.sft_tasks()
    trainer = EnsembleSFTTrainer(
        model=base_folder,
        args=sft_config(tmp_path / "run", eval_strategy="steps", eval_steps=4, num_train_epochs=1),
        train_dataset=split(tasks, "train"),
        eval_dataset={name: Dataset.from_list(tasks[name]["validation"]) for name in ("sums", "diffs")},
        callbacks=[seen],
        compute_metrics=token_accuracy,
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["eval_loss"] == pytest.approx((entry["eval_sums_loss"] + entry["eval_diffs_loss"]) / 2)
    assert entry["eval_tokens"] == pytest.approx((entry["eval_sums_tokens"] + entry["eval_diffs_tokens"]) / 2)
    assert len(seen.evaluated) == len([own for own in trainer.state.log_history if "eval_loss" in own])
    output = trainer.predict(trainer.eval_dataset)
    assert len(output.label_ids) == sum(map(len, trainer.eval_dataset.values()))
    assert output.metrics["test_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])
