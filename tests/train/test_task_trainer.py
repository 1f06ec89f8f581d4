"""The plain trainers that the others are made of."""

import pytest
from transformers import TrainingArguments
from trl import SFTConfig

from helpers import toy
from helpers.trainers import SMALL, sft_config, sft_trainer
from hf_ensemble import (
    EnsembleSFTTrainer,
    SubsetEstimator,
    TaskSet,
)
from hf_ensemble.runs import TrainedAdapter
from hf_ensemble.tasks import TASK, TaskWeightedSampler
from hf_ensemble.train.task_trainer import TaskSFTTrainer, TaskTrainer


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
    begun = TrainedAdapter("x", {"diffs": 1.0, "sums": 0.5}, trainer.args.seed, theta0="")
    inner = trainer.flow.training.make_trainer(begun, trainer.train_dataset)
    assert inner.sampling_weights == {"diffs": 3.0, "sums": 0.5}
    store = trainer.capture()
    estimator = trainer.selector().estimator
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
