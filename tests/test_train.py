import json

import numpy as np
import pytest
import torch
import toy
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_ensemble import (
    EnsembleConfig,
    EnsembleSFTConfig,
    EnsembleSFTTrainer,
    EnsembleTrainer,
    PeftEnsembleModel,
    SelectionConfig,
    SelectionSFTConfig,
    SelectionSFTTrainer,
    SelectionTrainer,
    SubsetEstimator,
    TaskSet,
    measure_fidelity,
)
from hf_ensemble.errors import ConfigurationError, RunMismatchError, TaskError
from hf_ensemble.store import GradientStore
from hf_ensemble.tasks import TASK, TaskWeightedSampler
from hf_ensemble.train.scored_runs import scored_run
from hf_ensemble.train.task_trainer import TaskSFTTrainer, TaskTrainer

SMALL = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "logging_strategy": "no",
}
ESTIMATE = {"projection_dim": 128, "num_components": 20}


def sft_config(folder, config_class=EnsembleSFTConfig, **changes):
    settings = {**SMALL, **ESTIMATE, "bf16": False, "gradient_checkpointing": False, "output_dir": str(folder)}
    if config_class is EnsembleSFTConfig:
        settings["num_subsets"] = 20
    return config_class(**{**settings, **changes})


def split(tasks, name):
    return {task: splits[name] for task, splits in tasks.items()}


def sft_trainer(folder, base, tasks=None, **changes):
    tasks = tasks or toy.sft_tasks()
    return EnsembleSFTTrainer(
        model=base,
        args=sft_config(folder, **changes),
        train_dataset=split(tasks, "train"),
        eval_dataset=split(tasks, "validation"),
        peft_config=toy.lora(),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished ensemble run."""
    folder = tmp_path_factory.mktemp("finished")
    base = toy.save_model(toy.llama(), folder / "base")
    trainer = sft_trainer(folder / "run", base, num_groups=2)
    output = trainer.train()
    return trainer, output, base


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
    }
    names = ["tasks.json", "groups.json", "evaluation.json", "baseline/adapter_model.safetensors"]
    names += [f"estimate/{name}.json" for name in ("estimate", "weights")]
    names += [f"ensemble/{n}" for n in ("README.md", "ensemble_config.json", "assets/affinity.png")]
    names += [f"ensemble/adapters/{n}/adapter_model.safetensors" for n in trainer.ensemble.adapter_names]
    assert set(trainer.ensemble.adapter_names) - {"baseline"} == {"group_0", "group_1"}
    assert [name for name in names if not (run / name).is_file()] == []
    assert sorted(p.name for p in (run / "training").iterdir()) == ["baseline.json", "group_0.json", "group_1.json"]
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


def test_model_is_back_at_its_start_and_reloaded_ensemble_agrees(finished):
    trainer, _, _ = finished
    run = trainer.run_directory.path
    parameters = dict(trainer.model.named_parameters())
    assert all(torch.equal(parameters[n].cpu(), p) for n, p in trainer.adapter_training.theta0.items())
    loaded = PeftEnsembleModel.from_pretrained(run / "ensemble")
    ids = torch.randint(3, 20, (3, 6))
    with torch.no_grad():
        expected = trainer.ensemble.eval()(input_ids=ids, task=list(trainer.tasks)).logits
        assert torch.allclose(loaded(input_ids=ids, task=list(trainer.tasks)).logits, expected, atol=1e-5)


def test_weights_are_no_worse_than_the_own_group_or_the_baseline(finished):
    trainer, output, _ = finished
    for task in trainer.tasks:
        assert output.metrics[f"eval_{task}_loss"] <= output.metrics[f"eval_baseline_{task}_loss"] + 1e-3
    kept = trainer.ensemble.weights
    trainer.ensemble.weights = {task: {trainer.grouping.group_of(task): 1.0} for task in trainer.tasks}
    own = trainer.evaluate()
    trainer.ensemble.weights = kept
    trainer.evaluate()
    for task in trainer.tasks:
        assert output.metrics[f"eval_{task}_loss"] <= own[f"eval_{task}_loss"] + 1e-3


def test_evaluating_other_rows(finished):
    trainer, _, _ = finished
    rows = {"sums": Dataset.from_list(toy.sum_rows(5, 9))}
    metrics = trainer.evaluate(rows, metric_key_prefix="test")
    assert trainer.evaluate({"sums": toy.sum_rows(5, 9)}, metric_key_prefix="test") == metrics
    with pytest.raises(ConfigurationError, match=r"Call trainer.ensemble"):
        trainer.predict(rows["sums"])
    assert "test_sums_loss" in metrics and "test_baseline_sums_accuracy" in metrics
    with pytest.raises(TaskError, match="Unknown tasks"):
        trainer.evaluate({"other": rows["sums"]})


def test_a_finished_run_started_again_trains_nothing(finished, monkeypatch):
    trainer, output, base = finished
    monkeypatch.setattr(TaskSFTTrainer, "train", lambda *a, **k: pytest.fail("trained again"))
    again = sft_trainer(trainer.run_directory.path, base, num_groups=2)
    metrics = again.train().metrics
    compared = [key for key in output.metrics if key.endswith(("loss", "accuracy"))]
    assert {k: metrics[k] for k in compared} == pytest.approx({k: output.metrics[k] for k in compared})


def test_a_killed_run_goes_on_and_ends_with_the_same_adapters(finished, tmp_path, monkeypatch):
    whole, _, base = finished
    train, calls = TaskSFTTrainer.train, []

    def killed(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(self, *args, **kwargs)

    monkeypatch.setattr(TaskSFTTrainer, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        sft_trainer(tmp_path / "run", base, num_groups=2).train()
    sft_trainer(tmp_path / "run", base, num_groups=2).train()
    assert len(calls) == 4
    for name in ("baseline", "ensemble/adapters/group_0", "ensemble/adapters/group_1"):
        files = [run / name / "adapter_model.safetensors" for run in (whole.run_directory.path, tmp_path / "run")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_of_another_configuration_is_refused_by_name(finished):
    trainer, _, base = finished
    run = trainer.run_directory.path
    with pytest.raises(RunMismatchError, match=r"arguments.learning_rate: found 0.01, expected 0.02"):
        sft_trainer(run, base, num_groups=2, learning_rate=2e-2).train()
    other = toy.sft_tasks(train=13)
    with pytest.raises(RunMismatchError, match="tasks: found"):
        sft_trainer(run, base, other, num_groups=2).train()
    # Where and how to report is no part of what was trained.
    sft_trainer(run, base, num_groups=2, logging_steps=3, save_steps=7).open_run()


@pytest.mark.parametrize(
    "change",
    [
        {"projection_seed": 3},
        {"projection_dim": 64},
        {"feature_dtype": "float32"},
        {"max_length": 30},
        {"seed": 5},
        {"dataloader_drop_last": True},
        {"weight_decay": 0.1},
        {"num_components": 10},
        {"ensemble_weights": "own_group"},
        {"num_subsets": 21},
        {"train_baseline": False},
    ],
)
def test_every_argument_that_matters_is_compared(finished, change):
    trainer, _, base = finished
    with pytest.raises(RunMismatchError, match=f"{next(iter(change))}|theta0"):
        sft_trainer(trainer.run_directory.path, base, num_groups=2, **change).open_run()


def test_other_weights_of_the_same_name_are_another_run(finished, tmp_path):
    trainer, _, base = finished
    model = toy.llama(seed=5)
    model.config._name_or_path = base
    with pytest.raises(RunMismatchError, match="model.base_weights"):
        EnsembleSFTTrainer(
            model=model,
            args=sft_config(trainer.run_directory.path, num_groups=2),
            train_dataset=toy.sft_tasks(),
            processing_class=toy.tokenizer(),
            peft_config=toy.lora(),
        ).open_run()


def test_a_training_goes_on_from_its_last_whole_checkpoint_and_from_no_other(tmp_path, base_folder, monkeypatch):
    changes = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 4}

    def adapter(folder, mixture, kill_at=None):
        trainer = sft_trainer(tmp_path / folder, base_folder, **changes)
        trainer.open_run()
        step = TaskSFTTrainer.training_step

        def killed(self, *args, **kwargs):
            if kill_at is not None and self.state.global_step == kill_at:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        monkeypatch.setattr(TaskSFTTrainer, "training_step", killed)
        try:
            trainer.adapter_training.run("one", mixture, tmp_path / folder / "adapter")
        finally:
            monkeypatch.setattr(TaskSFTTrainer, "training_step", step)
        return load_file(str(tmp_path / folder / "adapter" / "adapter_model.safetensors"))

    whole, other = adapter("whole", ["sums"]), adapter("other", ["diffs"])
    for folder, mixture, expected in (("a", ["sums"], whole), ("b", ["diffs"], other)):
        with pytest.raises(KeyboardInterrupt):
            adapter(folder, ["sums"], kill_at=7)
        # What a kill in the middle of saving leaves.
        (tmp_path / folder / "training" / "one" / "checkpoint-8").mkdir()
        found = adapter(folder, mixture)
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_overwriting_starts_over(tmp_path, base_folder):
    first = sft_trainer(tmp_path / "run", base_folder, num_groups=1, num_train_epochs=1)
    first.train()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    second = sft_trainer(
        tmp_path / "run", base_folder, num_groups=1, num_train_epochs=1, margin="mean_log_odds", overwrite_run=True
    )
    second.train()
    assert GradientStore(tmp_path / "run" / "gradients").identity["config"]["margin"] == "mean_log_odds"
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_another_choice_of_groups_keeps_gradients_and_baseline(tmp_path, base_folder, monkeypatch):
    sft_trainer(tmp_path / "run", base_folder, num_groups=1, num_train_epochs=1).train()
    with pytest.raises(RunMismatchError, match="num_groups: found 1, expected 2"):
        sft_trainer(tmp_path / "run", base_folder, num_groups=2, num_train_epochs=1).train()
    train, trained = TaskSFTTrainer.train, []
    monkeypatch.setattr(
        TaskSFTTrainer, "train", lambda self, *a, **k: (trained.append(self.args.run_name), train(self))[1]
    )
    monkeypatch.setattr("hf_ensemble.train.stages.capture_gradients", lambda *a, **k: pytest.fail("captured again"))
    again = sft_trainer(tmp_path / "run", base_folder, num_groups=2, num_train_epochs=1, overwrite_run=True)
    again.train()
    assert trained == ["run-group_0", "run-group_1"] and len(again.grouping.groups) == 2


def test_an_old_record_is_not_taken_for_a_new_adapter(tmp_path, base_folder):
    trainer = sft_trainer(tmp_path / "run", base_folder, num_train_epochs=1)
    trainer.open_run()
    first = trainer.adapter_training.run("one", ["sums"], tmp_path / "adapter")
    assert trainer.adapter_training.run("one", ["sums"], tmp_path / "adapter") == first
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    (tmp_path / "adapter").rmdir()
    second = trainer.adapter_training.run("one", ["diffs"], tmp_path / "adapter")
    assert list(second.mixture) == ["diffs"] and (tmp_path / "adapter").is_dir()


def test_one_group_of_everything_is_the_baseline(tmp_path, base_folder):
    trainer = sft_trainer(tmp_path / "run", base_folder, num_groups=1, num_train_epochs=1)
    metrics = trainer.train().metrics
    assert trainer.ensemble.adapter_names == ["group_0"]
    assert metrics["eval_mean_loss"] == pytest.approx(metrics["eval_baseline_mean_loss"])
    assert [p.name for p in (tmp_path / "run" / "training").iterdir()] == ["baseline.json"]


def text_trainer(folder, model, tasks, trainer_class=EnsembleTrainer, config=EnsembleConfig, peft="SEQ_CLS", **changes):
    options = {"target": changes.pop("target")} if "target" in changes else {}
    return trainer_class(
        model=model,
        args=config(**{**SMALL, **ESTIMATE, "output_dir": str(folder), **changes}),
        train_dataset=split(tasks, "train"),
        eval_dataset=split(tasks, "validation"),
        processing_class=toy.tokenizer(),
        peft_config=toy.lora(peft) if peft else None,
        **options,
    )


def test_classification_from_an_encoder_gets_a_head_that_reloads(tmp_path):
    """The checkpoint has no head: each adapter brings its own."""
    base = toy.save_model(toy.bert(2).bert, tmp_path / "base")
    trainer = text_trainer(tmp_path / "run", base, toy.text_tasks(), num_groups=2, num_subsets=10)
    metrics = trainer.train().metrics
    assert trainer.label_space.names == ("negative", "positive", "no", "yes")
    assert trainer.model.config.id2label[3] == "yes"
    loaded = PeftEnsembleModel.from_pretrained(tmp_path / "run" / "ensemble")
    rows = [trainer.eval_dataset[task][0] for task in trainer.tasks]
    batch = trainer.data_collator(rows)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels", "task")}
    with torch.no_grad():
        found, expected = loaded(**inputs), trainer.ensemble.eval()(**inputs)
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)
    assert torch.allclose(found.loss, expected.loss, atol=1e-5)
    assert 0 <= metrics["eval_films_accuracy"] <= 1


def test_loss_of_a_classifier_counts_the_own_labels_alone(tmp_path):
    trainer = text_trainer(tmp_path / "run", toy.bert(4), toy.text_tasks())
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (0, 13, 25)])
    ids = {key: value for key, value in batch.items() if key not in ("labels", "task", "example_id")}
    with torch.no_grad():
        trainer.model.eval()
        found = trainer.compute_loss(trainer.model, dict(batch))
        logits = trainer.model(**ids).logits
    expected = 0
    for row, (task, label) in enumerate(zip(batch["task"], batch["labels"])):
        own = list(trainer.label_space.task_labels[task])
        expected = expected - torch.log_softmax(logits[row, own], -1)[own.index(int(label))]
    assert torch.allclose(found, expected / 3, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_gradient_accumulation_gives_the_same_classifier(tmp_path, batch_size):
    """Eight rows in one step, however they are cut."""
    tasks = {"t": {"train": toy.text_rows(8), "validation": toy.text_rows(2, 1)}}
    adapters = []
    for size in (8, batch_size):
        changes = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": 8 // size,
            "num_train_epochs": 1,
            "max_grad_norm": 0.0,
            "optim": "sgd",
        }
        trainer = text_trainer(tmp_path / f"run{size}", toy.bert(2), tasks, **changes)
        trainer.open_run()
        trainer.adapter_training.run("one", ["t"], tmp_path / f"adapter{size}")
        adapters.append(load_file(str(tmp_path / f"adapter{size}" / "adapter_model.safetensors")))
    for name, value in adapters[0].items():
        assert torch.allclose(value, adapters[1][name], atol=1e-6), name


@pytest.mark.parametrize("trainer_class", [TaskTrainer, TaskSFTTrainer])
def test_meta_columns_reach_the_batch_and_not_the_model(tmp_path, base_folder, trainer_class):
    trainer = sft_trainer(tmp_path / "run", base_folder)
    args_class = SFTConfig if trainer_class is TaskSFTTrainer else TrainingArguments
    settings = {**SMALL, "bf16": False, "gradient_checkpointing": False}
    inner = trainer_class(
        model=trainer.model,
        args=args_class(output_dir=str(tmp_path / "inner"), **settings),
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset["sums"],
        processing_class=toy.tokenizer(),
        data_collator=trainer.data_collator,
    )
    batch = next(iter(inner.get_train_dataloader()))
    assert len(batch["task"]) == len(batch["example_id"]) == len(batch["input_ids"]) == 4
    by_id = {(r["task"], r["example_id"]): r["input_ids"] for r in trainer.train_dataset}
    for task, example_id, ids in zip(batch["task"], batch["example_id"], batch["input_ids"].tolist()):
        own = by_id[task, example_id]
        assert ids[: len(own)] == own
    seen = []

    def look(module, args, kwargs):
        seen.append(set(kwargs))

    inner.model.register_forward_pre_hook(look, with_kwargs=True)
    inner.train()
    inner.evaluate()
    assert seen and not any({"task", "example_id"} & names for names in seen)


def test_sampling_weights_reach_the_sampler(tmp_path, base_folder):
    tasks = TaskSet.from_datasets(toy.sft_tasks(), sampling_weights={"diffs": 3.0})
    trainer = EnsembleSFTTrainer(
        model=base_folder,
        args=sft_config(tmp_path / "run", train_baseline=False),
        train_dataset=tasks,
        peft_config=toy.lora(),
    )
    sampler = trainer._get_train_sampler()
    assert isinstance(sampler, TaskWeightedSampler)
    # 12 rows of weight 3 beside 24 of weight 1, the heaviest task's rows once each.
    assert len(sampler) == round(12 + 24 / 3)
    shares = []
    for epoch in range(50):
        sampler.set_epoch(epoch)
        shares += [trainer.train_dataset[i][TASK] == "diffs" for i in sampler]
    assert abs(sum(shares) / len(shares) - 0.6) < 0.06
    trainer.open_run()
    inner = trainer.adapter_training._inner_trainer(
        "x", tmp_path / "x", {"diffs": 1.0, "sums": 0.5}, trainer.train_dataset
    )
    assert inner.sampling_weights == {"diffs": 3.0, "sums": 0.5}
    store = trainer.capture()
    estimator = trainer.selector(store).estimator
    twice = SubsetEstimator(store.table("train"), store.table("validation"), 20)
    scale = estimator.regularization.l2_scale
    weighted = estimator.predict([[1.0, 1.0, 0.0]], l2_scale=scale).coefficients
    assert (weighted != twice.predict([[1.0, 1.0, 0.0]], l2_scale=scale).coefficients).any()
    assert not isinstance(sft_trainer(tmp_path / "other", base_folder)._get_train_sampler(), TaskWeightedSampler)


def test_evaluation_before_and_during_training_is_the_plain_one(tmp_path, base_folder):
    trainer = sft_trainer(tmp_path / "run", base_folder, num_groups=2, eval_strategy="epoch", num_train_epochs=1)
    assert "eval_sums_loss" in trainer.evaluate() and trainer.ensemble is None
    trainer.train()
    evaluated = [
        entry for entry in trainer.state.log_history if "adapter" in entry and any("eval_" in k for k in entry)
    ]
    assert {entry["adapter"] for entry in evaluated} == {"baseline", "group_0", "group_1"}


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


@pytest.mark.parametrize("meta", [False, True])
def test_selection_trains_once_on_what_it_chose(tmp_path, base_folder, meta):
    tasks = toy.sft_tasks()
    arguments = {
        "model": base_folder,
        "args": sft_config(tmp_path / "run", SelectionSFTConfig, meta_initialization=meta, max_auxiliary=1),
        "train_dataset": split(tasks, "train"),
        "eval_dataset": split(tasks, "validation"),
        "peft_config": toy.lora(),
        "target": "sums",
    }
    trainer = SelectionSFTTrainer(**arguments)
    metrics = trainer.train().metrics
    assert trainer.selection.tasks[0] == "sums" and len(trainer.selection.tasks) <= 2
    record = json.loads((tmp_path / "run" / "training" / "adapter.json").read_text())
    assert list(record["mixture"]) == trainer.selection.tasks
    assert metrics["eval_loss"] == metrics["eval_sums_loss"]
    trainer.evaluate({"sums": toy.sum_rows(4, 9)}, metric_key_prefix="test")
    assert set(json.loads((tmp_path / "run" / "evaluation.json").read_text())) == {"eval", "test"}
    assert (tmp_path / "run" / "meta" / "adapter_model.safetensors").exists() == meta
    # The model in hand is the fine-tuned one.
    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "run" / "adapter")
    ids = torch.randint(3, 20, (2, 5))
    with torch.no_grad():
        assert torch.allclose(trainer.model.eval()(input_ids=ids).logits, saved.eval()(input_ids=ids).logits, atol=1e-6)
    again = SelectionSFTTrainer(**arguments).train().metrics
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"])


def test_selection_of_classification_tasks(tmp_path):
    trainer = text_trainer(
        tmp_path / "run",
        toy.bert(4),
        toy.text_tasks(),
        SelectionTrainer,
        SelectionConfig,
        target="films",
        selection_method="random_ensemble",
    )
    assert "eval_accuracy" in trainer.train().metrics
    with pytest.raises(ConfigurationError, match="Unknown target 'x'"):
        text_trainer(tmp_path / "r", toy.bert(4), toy.text_tasks(), SelectionTrainer, SelectionConfig, target="x")


def test_fidelity_compares_with_real_trainings_and_resumes(finished, monkeypatch):
    trainer, _, _ = finished
    estimator = trainer.selector(trainer.capture()).estimator
    # The baseline calibrates, so that all tasks together are no test.
    assert [sorted(run.mixture) for run in estimator.observed_runs] == [sorted(trainer.tasks)]
    subsets = [["sums"], ["diffs"], ["sums", "diffs"], ["more_sums", "diffs"], trainer.tasks.names]
    report = measure_fidelity(trainer, subsets=subsets, num_repeated=3, num_transplanted=1)
    assert report.subsets == subsets[:4] and report.calibration_subsets == [list(trainer.tasks)]
    predicted = estimator.predict_subsets(subsets[:4])
    true = np.array(report.true_loss)
    assert report.mean_relative_error == pytest.approx(np.mean(np.abs(predicted.loss - true) / true))
    held = (predicted.loss_low <= true) & (true <= predicted.loss_high)
    assert report.interval_coverage == pytest.approx(held.mean()) and report.interval_level == 0.9
    assert report.ceiling.num_subsets == 3 and report.ceiling.mean_relative_error > 0
    assert report.first_order.num_subsets == 1 and report.first_order.training_distance > 0
    assert report.speed_up > 0
    saved = json.loads((trainer.run_directory.path / "estimate" / "fidelity.json").read_text())
    assert saved["true_loss"] == report.true_loss
    # Two subsets hold a task: too few for a rank correlation, and JSON has no NaN.
    assert np.isnan(report.mean_task_spearman_inside) == (saved["mean_task_spearman_inside"] is None)
    monkeypatch.setattr(TaskSFTTrainer, "train", lambda *a, **k: pytest.fail("trained again"))
    again = measure_fidelity(trainer, subsets=subsets, num_repeated=3, num_transplanted=1)
    assert again.true_loss == report.true_loss
    assert again.first_order == report.first_order


def test_a_scored_run_is_a_plain_training_and_its_seed_counts(finished):
    trainer, _, _ = finished
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    run, other = scored_run(trainer, ["sums"]), scored_run(trainer, ["sums"], seed=7)
    assert run.scores["sums"]["loss"] != other.scores["sums"]["loss"] and run.distance > 0
    trained = trainer.adapter_training.run("plain", ["sums"], trainer.run_directory.path / "plain")
    assert trained.distance == pytest.approx(run.distance)
    scores = trainer.score_adapter(trainer.run_directory.path / "plain", trainer.eval_dataset, "x")
    assert scores["diffs"]["loss"] == pytest.approx(run.scores["diffs"]["loss"], abs=1e-6)
    assert all(torch.equal(before[n], p) for n, p in trainer.model.named_parameters() if n in before)
    assert not [path for path in (trainer.run_directory.path / "scored_runs").iterdir() if path.is_dir()]


def test_calibration_runs_are_made_once(tmp_path, base_folder, monkeypatch):
    trainer = sft_trainer(tmp_path / "run", base_folder, train_baseline=False, calibration_runs=2, num_train_epochs=1)
    runs = trainer.observed_runs()
    assert len(runs) == 2 and set(runs[0].mixture) == set(trainer.tasks) and len(runs[1].mixture) == 1
    monkeypatch.setattr(TaskSFTTrainer, "train", lambda *a, **k: pytest.fail("trained again"))
    assert trainer.observed_runs() == runs
    none = sft_trainer(tmp_path / "none", base_folder, train_baseline=False, calibration_runs=0)
    assert none.observed_runs() == []
    with pytest.raises(ConfigurationError, match="calibration_runs has to be 0 or more"):
        sft_trainer(tmp_path / "bad", base_folder, calibration_runs=-1)


def test_bad_arguments_are_named(tmp_path, base_folder):
    tasks = toy.sft_tasks()
    for changes, error, message in [
        ({"packing": True}, ConfigurationError, "Packed rows lose their task"),
        ({"num_components": 0}, ConfigurationError, "num_components"),
        ({"grouping_method": "x"}, ConfigurationError, "grouping_method"),
        ({"ensemble_weights": "x"}, ConfigurationError, "ensemble_weights"),
        ({"margin": "x"}, ConfigurationError, "margin"),
        ({"max_length": 2}, TaskError, "is left after tokenization"),
        ({"num_groups": 0}, ConfigurationError, "num_groups has to be a positive number"),
        ({"num_groups": 4}, ConfigurationError, "num_groups=4 is more than the 3 tasks"),
    ]:
        with pytest.raises(error, match=message):
            sft_trainer(tmp_path / "run", base_folder, tasks, **changes)
    arguments = {"model": base_folder, "args": sft_config(tmp_path / "run"), "peft_config": toy.lora()}
    with pytest.raises(TaskError, match="dict of named datasets, found list"):
        EnsembleSFTTrainer(**arguments, train_dataset=tasks["sums"]["train"])
    plain = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ConfigurationError, match="Expected args to be a EnsembleSFTConfig, found a SFTConfig"):
        EnsembleSFTTrainer(**{**arguments, "args": plain}, train_dataset=tasks)
    with pytest.raises(TaskError, match="Use EnsembleTrainer"):
        EnsembleSFTTrainer(**arguments, train_dataset=toy.text_tasks())
    with pytest.raises(ConfigurationError, match="Pass peft_config"):
        EnsembleSFTTrainer(**{**arguments, "peft_config": None}, train_dataset=tasks)
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ConfigurationError, match="optimizer_cls_and_kwargs"):
        EnsembleSFTTrainer(**arguments, train_dataset=tasks, optimizers=(optimizer, None))
    with pytest.raises(ConfigurationError, match="4 different labels, the model's head has 3"):
        text_trainer(tmp_path / "run", toy.bert(3), toy.text_tasks())
    trainer = sft_trainer(tmp_path / "run", base_folder)
    with pytest.raises(ConfigurationError, match="call train"):
        trainer.push_to_hub()


@pytest.mark.parametrize("config", [EnsembleConfig, EnsembleSFTConfig, SelectionConfig, SelectionSFTConfig])
def test_configs_are_parsed_from_flags_and_explain_themselves(config, tmp_path):
    flags = ["--output_dir", str(tmp_path), "--projection_dim", "64", "--use_cpu", "--bf16", "false"]
    (parsed,) = HfArgumentParser(config).parse_args_into_dataclasses(flags)
    assert parsed.projection_dim == 64
    base = SFTConfig if issubclass(config, SFTConfig) else TrainingArguments
    own = set(config.__dataclass_fields__) - set(base.__dataclass_fields__)
    assert own and all(config.__dataclass_fields__[name].metadata["help"] for name in own)
    assert issubclass(config, TrainingArguments)


def test_trainers_are_trainers():
    assert issubclass(EnsembleSFTTrainer, SFTTrainer) and issubclass(SelectionSFTTrainer, SFTTrainer)
    assert issubclass(EnsembleTrainer, Trainer) and issubclass(SelectionTrainer, Trainer)
