"""The loss of each task in the logs, and steps whose loss is averaged over tasks."""

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from torch.nn import functional as F
from trl import SFTConfig, SFTTrainer

from helpers import toy
from helpers.trainers import SMALL, sft_config, split, text_trainer
from hf_ensemble import EnsembleConfig, EnsembleSFTTrainer, EnsembleTrainer, SelectionConfig
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.train.losses.convergence import convergence_weights

SIZES = {"sums": (7, "sum"), "diffs": (10, "diff"), "more": (15, "sum")}
TASKS = {
    name: {"train": toy.sum_rows(count, 1, word), "validation": toy.sum_rows(4, 2, word)}
    for name, (count, word) in SIZES.items()
}
LABELS = {"films": (7, ("bad", "good")), "books": (10, ("bad", "good")), "songs": (15, ("no", "yes"))}
TEXTS = {
    name: {split: toy.text_rows(rows, 1, name[:-1], labels) for split, rows in (("train", count), ("validation", 4))}
    for name, (count, labels) in LABELS.items()
}
# The model does not move, so that losses are those of its start.
STILL = {"learning_rate": 1e-12, "num_train_epochs": 1, "logging_strategy": "steps", "logging_steps": 100}
# One step on all rows.
STEP = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,
    "num_train_epochs": 1,
    "lr_scheduler_type": "constant",
}
STEP |= {"logging_strategy": "steps", "logging_steps": 1}
CUTS = [{"per_device_train_batch_size": 32}, {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 7}]


def sft(folder, trainer_class=EnsembleSFTTrainer, model=None, **changes):
    """A trainer of one model on all tasks."""
    return trainer_class(
        model=toy.llama() if model is None else model,
        args=sft_config(folder, **changes),
        train_dataset=split(TASKS, "train"),
        eval_dataset={name: Dataset.from_list(rows) for name, rows in split(TASKS, "validation").items()},
        processing_class=toy.tokenizer(),
    )


def classifier(folder, **changes):
    return text_trainer(folder, toy.bert(4), TEXTS, peft=None, **changes)


def language_model(folder, **changes):
    return text_trainer(folder, toy.llama(), TASKS, peft=None, **changes)


MAKERS = {"sft": sft, "classifier": classifier, "language_model": language_model}


def losses_by_row(trainer, model, kind="nll"):
    """Losses of the tokens of every training row, by task, each row by itself."""
    found = {}
    with torch.no_grad() if not model.training else torch.enable_grad():
        for row in trainer.train_dataset:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            logits = model(input_ids=ids).logits[0]
            if labels.dim() == 0:
                (mask,) = trainer.label_space.mask([row["task"]])
                losses = F.cross_entropy(logits.masked_fill(~mask, -torch.inf), labels).unsqueeze(0)
            else:
                kept = labels[1:] != -100
                losses = F.cross_entropy(logits[:-1][kept], labels[1:][kept], reduction="none")
                losses = losses * (-losses).exp().detach() if kind == "dft" else losses
            found.setdefault(row["task"], []).append(losses)
    return {task: torch.cat(losses) for task, losses in found.items()}


@pytest.mark.parametrize(
    ("maker", "changes"),
    [
        ("sft", {"gradient_accumulation_steps": 3, "loss_type": "dft"}),
        ("sft", {"padding_free": True, "max_length": None, "pad_to_multiple_of": 8}),
        # Packs of a task each: one of several tasks has no loss of a task.
        ("sft", {"packing": True, "max_length": 24, "task_loss_weighting": "tasks"}),
        ("classifier", {"gradient_accumulation_steps": 3}),
        ("language_model", {}),
    ],
    ids=["dft", "padding_free", "packed", "classifier", "language_model"],
)
def test_logs_hold_the_mean_loss_of_each_task(tmp_path, maker, changes):
    trainer = MAKERS[maker](tmp_path, **STILL, **changes)
    plain = trainer if "packing" not in changes else sft(tmp_path / "plain")
    expected = losses_by_row(plain, trainer.model.eval(), changes.get("loss_type"))
    trainer.args.logging_steps = 100
    trainer.args.logging_strategy = "epoch"
    trainer.train()
    (logs,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {task: logs[f"loss_{task}"] for task in expected}
    assert found == pytest.approx({task: float(losses.mean()) for task, losses in expected.items()}, rel=1e-5)


def test_the_loss_itself_is_the_parents_to_the_last_bit(tmp_path):
    changes = {"gradient_accumulation_steps": 3, "logging_strategy": "steps", "logging_steps": 2}
    ours = sft(tmp_path / "ours", **changes)
    ours.train()
    settings = {**SMALL, "bf16": False, "gradient_checkpointing": False, **changes}
    parent = SFTTrainer(
        model=toy.llama(),
        args=SFTConfig(output_dir=str(tmp_path / "parent"), **settings),
        train_dataset=concatenate_datasets([Dataset.from_list(own["train"]) for own in TASKS.values()]),
        processing_class=toy.tokenizer(),
    )
    parent.train()
    logs = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (ours, parent)]
    assert logs[0] == logs[1] and len(logs[0]) > 2
    theirs = parent.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.model.state_dict().items())
    entries = [entry for entry in ours.state.log_history if "loss" in entry]
    assert any({f"loss_{task}" for task in TASKS} <= set(entry) for entry in entries)


@pytest.mark.parametrize(
    ("maker", "kind", "cut"),
    [
        ("sft", "nll", {**CUTS[1], "padding_free": True, "max_length": None}),
        ("sft", "dft", CUTS[0]),
        ("classifier", "", CUTS[0]),
        ("classifier", "", CUTS[1]),
        ("language_model", "", CUTS[1]),
    ],
)
def test_each_task_of_a_step_counts_equally(tmp_path, maker, kind, cut):
    changes = {**STEP, **cut, "task_loss_weighting": "tasks", **({"loss_type": kind} if kind else {})}
    trainer = MAKERS[maker](tmp_path, **changes)
    reference = type(trainer.model)(trainer.model.config)
    reference.load_state_dict(trainer.model.state_dict())
    losses = losses_by_row(trainer, reference.train(), kind)
    loss = torch.stack([own.mean() for own in losses.values()]).mean()
    loss.backward()
    trainer.train()
    (logs,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert logs["loss_sums" if "sums" in losses else "loss_films"] == pytest.approx(
        next(iter(losses.values())).mean().item(), rel=1e-5
    )
    found = dict(trainer.model.named_parameters())
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(found[name], parameter - 0.1 * parameter.grad, atol=1e-5), name


def test_a_step_without_a_task_is_the_mean_of_the_others(tmp_path):
    trainer = sft(tmp_path, task_loss_weighting="tasks", per_device_train_batch_size=1, **STILL | {"logging_steps": 1})
    trainer.train()
    for logs in trainer.state.log_history[:-1]:
        (own,) = [value for name, value in logs.items() if name.startswith("loss_")]
        assert logs["loss"] == pytest.approx(own, rel=1e-5)


def test_slow_tasks_weigh_more_and_diverging_ones_less():
    steps = [0, 10, 20, 30, 40]
    slow, fast = np.exp(-0.1 * np.arange(5)), np.exp(-0.6 * np.arange(5))
    for count in (1,):
        assert convergence_weights(np.stack([slow, fast], 1)[:count], steps[:count], 4).tolist() == [0.5, 0.5]
    weights = convergence_weights(np.stack([slow, fast], 1)[:2], steps[:2], 4)
    # Of the first slope the divergence factor is 1: the softmax of K alpha_i / sum |alpha_j|.
    slopes = np.array([slow[1] - 1, fast[1] - 1])
    scores = np.exp(2 * slopes / np.abs(slopes).sum())
    assert weights == pytest.approx(scores / scores.sum()) and weights[0] > weights[1]
    # Scales of losses and distances of evaluations do not matter.
    scaled = convergence_weights(np.stack([5 * slow, fast], 1), [3 * step for step in steps], 4)
    assert scaled == pytest.approx(convergence_weights(np.stack([slow, fast], 1), steps, 4))
    assert scaled.sum() == pytest.approx(1) and scaled[0] > 0.5
    diverging = np.array([1.0, 0.6, 0.5, 0.9, 1.6])
    assert convergence_weights(np.stack([diverging, fast], 1), steps, 2)[0] < 0.5
    assert convergence_weights(np.ones((5, 2)), steps, 4).tolist() == [0.5, 0.5]


def test_a_resumed_training_logs_and_weighs_as_one_that_was_not_interrupted(tmp_path):
    changes = {"task_loss_weighting": "convergence", "task_sampling": "temperature", "coba_window": 2}
    changes |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 5}
    changes |= {"logging_strategy": "steps", "logging_steps": 3, "num_train_epochs": 2, "eval_on_start": True}

    def logs_of(trainer):
        kept = [
            {name: value for name, value in entry.items() if "loss" in name or name == "step"}
            for entry in trainer.state.log_history
        ]
        return [entry for entry in kept if entry["step"] > 0]

    whole = sft(tmp_path, **changes)
    whole.train()
    resumed = sft(tmp_path, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    logs = logs_of(whole)
    # An evaluation on start is made again, at the step that is resumed from.
    assert [entry for entry in logs_of(resumed) if entry["step"] != 5] == logs
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())
    weights = [[entry[f"loss_weight_{task}"] for task in TASKS] for entry in logs if "loss_weight_sums" in entry]
    assert len(weights) > 3 and weights[-1] != weights[0] and np.allclose(np.sum(weights, axis=1), 1)


def own_loss(outputs, labels, num_items_in_batch=None):
    return outputs["logits"].sum() * 0.0 + 1.0


@pytest.mark.parametrize("peft", [None, "SEQ_CLS"])
def test_losses_that_cannot_be_weighted_are_refused_by_name(tmp_path, peft):
    def make(changes, **options):
        args = EnsembleConfig(**{**SMALL, "output_dir": str(tmp_path), "task_loss_weighting": "tasks", **changes})
        EnsembleTrainer(
            model="no model",
            args=args,
            train_dataset=split(TEXTS, "train"),
            peft_config=peft and toy.lora(peft),
            processing_class=toy.tokenizer(),
            **options,
        )

    with pytest.raises(ConfigurationError, match="compute_loss_func is given: its loss is not one of single tokens"):
        make({}, compute_loss_func=own_loss)
    with pytest.raises(ConfigurationError, match="'convergence' weighs tasks .* expected eval_strategy.* found 'no'"):
        make({"task_loss_weighting": "convergence"})
    if peft is None:
        with pytest.raises(ConfigurationError, match="evaluation rows of every task, lacking are those of .'films'"):
            make({"task_loss_weighting": "convergence", "eval_strategy": "epoch"}, eval_dataset=None)
    with pytest.raises(ConfigurationError, match="mixture' weighs tasks by .*task_loss_weighting='tasks'"):
        SelectionConfig(output_dir=str(tmp_path), use_cpu=True, selection_method="mixture", task_loss_weighting="tasks")


def test_a_loss_that_never_asks_for_its_parents_cannot_be_weighted(tmp_path):
    class Mine(EnsembleSFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs, fused_lm_head=True).loss

    trainer = sft(tmp_path, Mine, task_loss_weighting="tasks")
    with pytest.raises(ConfigurationError, match=r"Mine.compute_loss does not give. Call super\(\).compute_loss"):
        trainer.train()
    trainer = sft(tmp_path, Mine, max_steps=1, logging_strategy="steps", logging_steps=1)
    trainer.train()
    assert "loss" in trainer.state.log_history[0] and "loss_sums" not in trainer.state.log_history[0]


def test_label_smoothing_leaves_the_tasks_out_of_the_logs(tmp_path):
    trainer = sft(tmp_path, label_smoothing_factor=0.1, max_steps=1, logging_strategy="steps", logging_steps=1)
    trainer.train()
    assert not any(name.startswith("loss_") for name in trainer.state.log_history[0])
