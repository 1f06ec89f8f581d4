"""Scores do not depend on how a training loads its rows, on batches, or on what stands beside a row."""

import numpy as np
import pytest
import torch

from helpers import toy
from helpers.trainers import sft_trainer, text_trainer
from hf_ensemble.errors import ScoringError, TaskError
from hf_ensemble.evaluate import Evaluator, TaskScores, mean_scores
from hf_ensemble.models.answer_scorer import AnswerScorer
from hf_ensemble.tasks import TaskCollator


def tasks():
    """Validation sets of different sizes, no multiple of a batch."""
    sizes = {"sums": 11, "diffs": 4, "more_sums": 7}
    return {
        name: {"train": splits["train"], "validation": toy.sum_rows(sizes[name], 2, word)}
        for (name, splits), word in zip(toy.sft_tasks().items(), ("sum", "diff", "sum"))
    }


def scores_of(trainer):
    trainer.open_run()
    context = trainer.flow.context
    return context.evaluator.score_tasks(context.answer_scorer(), context.eval_tables)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """By plain forwards of each row alone."""
    folder = tmp_path_factory.mktemp("expected")
    base = toy.save_model(toy.llama(), folder / "base")
    trainer, found = sft_trainer(folder / "run", base, tasks()), {}
    trainer.model.eval()
    for name, rows in trainer.eval_dataset.items():
        losses, right = [], []
        for row in rows:
            labels = torch.tensor(row["labels"])[1:]
            with torch.no_grad():
                logits = trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            losses.append(float(torch.nn.functional.cross_entropy(logits, labels)))
            right.append(bool((logits.argmax(-1) == labels)[labels != -100].all()))
        found[name] = TaskScores(float(np.mean(losses)), float(np.mean(right)), len(rows))
    return base, found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"dataloader_drop_last": True},
        {"train_sampling_strategy": "group_by_length", "per_device_eval_batch_size": 3},
        {"per_device_eval_batch_size": 1},
    ],
    ids=lambda changes: "-".join(changes) or "defaults",
)
def test_options_of_training_loaders_do_not_change_scores(tmp_path, expected, changes):
    base, wanted = expected
    found = scores_of(sft_trainer(tmp_path / "run", base, tasks(), **changes))
    assert {name: own.num_examples for name, own in found.items()} == {"sums": 11, "diffs": 4, "more_sums": 7}
    for name, own in found.items():
        assert own.loss == pytest.approx(wanted[name].loss, abs=1e-5) and own.accuracy == wanted[name].accuracy


def test_rows_come_back_in_their_order(tmp_path, base_folder):
    trainer = sft_trainer(tmp_path / "run", base_folder, tasks(), train_sampling_strategy="group_by_length")
    trainer.open_run()
    context = trainer.flow.context
    rows = context.eval_tables["sums"]
    assert len({len(ids) for ids in rows["input_ids"]}) > 1
    together = context.evaluator.score_rows(context.answer_scorer(), rows)
    alone = [context.evaluator.score_rows(context.answer_scorer(), rows.select([i])) for i in range(len(rows))]
    assert together.margin == pytest.approx(np.array([own.margin[0] for own in alone]), abs=1e-5)
    assert together.loss == pytest.approx(np.logaddexp(0, -together.margin), abs=1e-5)


def test_scoring_leaves_modes_and_random_state_alone(tmp_path, base_folder):
    trainer = sft_trainer(tmp_path / "run", base_folder)
    trainer.model.train()
    modes, state = {m: m.training for m in trainer.model.modules()}, torch.get_rng_state()
    scores_of(trainer)
    assert all(module.training == mode for module, mode in modes.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_halve_where_memory_runs_out(tmp_path, base_folder):
    trainer = sft_trainer(tmp_path / "run", base_folder, tasks(), per_device_eval_batch_size=8)
    trainer.open_run()
    context, sizes = trainer.flow.context, []
    scorer = context.answer_scorer()

    def small(inputs, labels, names):
        sizes.append(len(labels))
        if len(labels) > 2:
            raise RuntimeError("CUDA out of memory.")
        return scorer(inputs, labels, names)

    rows = context.eval_tables["sums"]
    assert context.evaluator.score_rows(small, rows).loss == pytest.approx(
        context.evaluator.score_rows(scorer, rows).loss, abs=1e-5
    )
    assert sizes[:3] == [8, 4, 2] and max(sizes[3:]) == 2


def test_rows_that_cannot_be_scored_are_named(tmp_path, base_folder):
    trainer = sft_trainer(tmp_path / "run", base_folder)
    trainer.train()
    long = {"sums": [{"prompt": "sum : " * 20 + "1 + 1 =", "completion": " 2"}]}
    trainer.args.max_length = 16
    with pytest.raises(TaskError, match="No row of task 'sums' is left to evaluate: .* Raise max_length"):
        trainer.evaluate(long)
    evaluator = Evaluator(
        trainer.model, TaskCollator(lambda rows: {k: torch.tensor([r[k] for r in rows]) for k in rows[0]}), 2
    )
    rows = trainer.eval_dataset["sums"].select([0]).map(lambda row: {"labels": [-100] * len(row["input_ids"])})
    rows = rows.select_columns(["input_ids", "labels", "task"])
    with pytest.raises(ScoringError, match="answer token"):
        evaluator.score_rows(AnswerScorer(trainer.model), rows)


def test_mixed_precision_of_the_training_is_that_of_every_pass(tmp_path, base_folder):
    """Capture, scoring of adapters and of the ensemble, and fitting of weights run as training does."""
    trainer = sft_trainer(tmp_path / "run", base_folder, num_groups=2, num_train_epochs=1, bf16=True)
    seen, layer = [], trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    # A hook that the user sets after the trainer was made stays on the model.
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    trainer.evaluate()
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    trainer.adapter_model(input_ids=torch.ones(1, 3, dtype=torch.long))
    assert seen == [torch.float32]
    handle.remove()


def test_classifiers_answer_with_the_labels_of_their_task(tmp_path):
    trainer = text_trainer(tmp_path / "run", toy.bert(4), toy.text_tasks())
    found = scores_of(trainer)
    for task, rows in trainer.eval_dataset.items():
        own = list(trainer.label_space.task_labels[task])
        losses = []
        for row in rows:
            batch = trainer.data_collator([row])
            with torch.no_grad():
                logits = trainer.model.eval()(input_ids=batch["input_ids"]).logits[0, own]
            losses.append(float(-torch.log_softmax(logits, -1)[own.index(row["labels"])]))
        assert found[task].loss == pytest.approx(np.mean(losses), abs=1e-5)


def test_means_count_tasks_alike():
    scores = {"a": TaskScores(1.0, 0.5, 3), "b": TaskScores(2.0, 1.0, 1)}
    assert mean_scores(scores) == TaskScores(1.5, 0.75, 4)
