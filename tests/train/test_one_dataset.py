"""Over one dataset a trainer is its parent: losses, metrics and weights are equal to the last bit."""

import inspect

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from helpers import toy
from hf_ensemble import (
    EnsembleConfig,
    EnsembleSFTConfig,
    EnsembleSFTTrainer,
    EnsembleTrainer,
    SelectionSFTTrainer,
    SelectionTrainer,
)
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.tasks import TaskSet, encode
from hf_ensemble.train.multi_task_sft_trainer import MultiTaskSFTTrainer
from hf_ensemble.train.multi_task_trainer import MultiTaskTrainer

BASE = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "logging_steps": 1,
    "seed": 3,
}
SFT_BASE = {**BASE, "bf16": False, "gradient_checkpointing": False}
ROWS = {split: Dataset.from_list(toy.sum_rows(count, 1)) for split, count in (("train", 12), ("test", 6))}
TEXT = {split: rows.map(lambda row: {"text": row["prompt"] + row["completion"]}) for split, rows in ROWS.items()}
TEXT = {split: rows.select_columns(["text"]) for split, rows in TEXT.items()}

# Arguments of both, and of the trainers themselves after `|`.
SFT_CASES = [
    {},
    {"gradient_accumulation_steps": 2},
    {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    {"max_steps": -1, "num_train_epochs": 2},
    {"learning_rate": None},
    {"lr_scheduler_type": "cosine", "warmup_steps": 1},
    {"lr_scheduler_type": "constant"},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
    {"weight_decay": 0.1, "max_grad_norm": 0.1},
    {"optim": "sgd"},
    {"optim": "adafactor"},
    {"adam_beta1": 0.5, "adam_epsilon": 1e-4},
    {"label_smoothing_factor": 0.1},
    {"loss_type": "dft"},
    {"completion_only_loss": False},
    {"completion_only_loss": True},
    {"max_length": 7},
    {"packing": True, "max_length": 16},
    {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
    {"packing": True, "eval_packing": False, "max_length": 16, "eval_strategy": "steps", "eval_steps": 1},
    {"padding_free": True, "max_length": None},
    {"pad_to_multiple_of": 8},
    {"shuffle_dataset": True},
    {"data_seed": 7},
    {"seed": 11},
    {"dataloader_drop_last": True, "per_device_train_batch_size": 5},
    {"train_sampling_strategy": "group_by_length"},
    {"train_sampling_strategy": "sequential"},
    {"neftune_noise_alpha": 5.0},
    {"bf16": True},
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    {"eval_strategy": "epoch", "max_steps": -1},
    {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": 1},
    {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2},
    {"average_tokens_across_devices": False},
    {"logging_nan_inf_filter": False, "logging_first_step": True},
    {"torch_empty_cache_steps": 1},
    {"include_num_input_tokens_seen": True},
    {"peft": True},
    {"peft": True, "gradient_accumulation_steps": 2},
    {"peft": True, "gradient_checkpointing": True},
    {"peft": True, "bf16": True},
    {"peft": True, "packing": True, "max_length": 16},
    {"peft": True, "init": "pissa"},
    {"rows": TEXT},
    {"rows": TEXT, "peft": True, "packing": True, "max_length": 16},
]
TEXT_CASES = [
    {},
    {"gradient_accumulation_steps": 2},
    {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    {"max_steps": -1, "num_train_epochs": 2},
    {"learning_rate": None},
    {"lr_scheduler_type": "cosine", "warmup_steps": 1},
    {"weight_decay": 0.1, "max_grad_norm": 0.1},
    {"optim": "sgd"},
    {"optim": "adafactor"},
    {"label_smoothing_factor": 0.1},
    {"data_seed": 7},
    {"seed": 11},
    {"dataloader_drop_last": True, "per_device_train_batch_size": 5},
    {"train_sampling_strategy": "group_by_length"},
    {"bf16": True},
    {"activation_checkpointing": True},
    {"eval_strategy": "epoch", "max_steps": -1},
    {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": 1},
    {"neftune_noise_alpha": 5.0},
    {"include_num_input_tokens_seen": True},
    {"peft": True},
    {"peft": True, "gradient_accumulation_steps": 2},
    {"peft": True, "bf16": True},
]


def trace(trainer):
    """What a training leaves: its log without times, its evaluation, and all weights."""
    output = trainer.train()
    logs = [
        {k: v for k, v in entry.items() if not k.endswith("_second") and "runtime" not in k}
        for entry in trainer.state.log_history
    ]
    evaluated = {k: v for k, v in trainer.evaluate().items() if not k.endswith("_second") and "runtime" not in k}
    return output.training_loss, logs, evaluated, trainer.model.state_dict()


def assert_same(parent, ours):
    assert parent[:3] == ours[:3]
    assert parent[3].keys() == ours[3].keys()
    assert all(torch.equal(value, ours[3][name]) for name, value in parent[3].items())


@pytest.mark.parametrize("case", SFT_CASES, ids=str)
def test_sft_equals_its_parent(case, tmp_path, base_folder):
    case = dict(case)
    rows, init = case.pop("rows", ROWS), case.pop("init", True)
    peft = toy.lora(init_lora_weights=init) if case.pop("peft", False) else None
    settings = {**SFT_BASE, **case}
    if settings["learning_rate"] is None:
        del settings["learning_rate"]
    traces = []
    for trainer_class, config_class in ((SFTTrainer, SFTConfig), (EnsembleSFTTrainer, EnsembleSFTConfig)):
        trainer = trainer_class(
            model=base_folder,
            args=config_class(output_dir=str(tmp_path / trainer_class.__name__), **settings),
            train_dataset=rows["train"],
            eval_dataset=rows["test"],
            peft_config=peft,
        )
        traces.append(trace(trainer))
    assert_same(*traces)


def tokens():
    tasks = TaskSet.from_datasets({"films": toy.text_rows(12, 1)}, {"films": toy.text_rows(6, 2)})
    rows = {
        split: encode(tasks.table(split), toy.tokenizer(), tasks.row_format, tasks.label_space)
        for split in ("train", "validation")
    }
    return {split: own.remove_columns(["task", "example_id"]) for split, own in rows.items()}


@pytest.mark.parametrize("case", TEXT_CASES, ids=str)
def test_classification_equals_its_parent(case, tmp_path):
    case = dict(case)
    has_adapter = case.pop("peft", False)
    settings = {**BASE, **case}
    if settings["learning_rate"] is None:
        del settings["learning_rate"]
    rows, traces = tokens(), []
    for trainer_class, config_class in ((Trainer, TrainingArguments), (EnsembleTrainer, EnsembleConfig)):
        model = toy.bert(2)
        trainer = trainer_class(
            model=toy.with_lora(model, r=2) if has_adapter else model,
            args=config_class(output_dir=str(tmp_path / trainer_class.__name__), **settings),
            train_dataset=rows["train"],
            eval_dataset=rows["validation"],
            processing_class=toy.tokenizer(),
        )
        traces.append(trace(trainer))
    assert_same(*traces)


def test_text_rows_are_tokenized_for_the_parent(tmp_path):
    """What a `Trainer` gets tokenized, an `EnsembleTrainer` also takes as text, in a dict of one or without it."""
    films = toy.text_rows(12, 1), toy.text_rows(6, 2)
    named = {"films": DatasetDict(train=Dataset.from_list(films[0]), validation=Dataset.from_list(films[1]))}
    plain = [Dataset.from_list(rows) for rows in films]
    rows, traces = tokens(), []
    for train, evaluation in (
        (rows["train"], rows["validation"]),
        plain,
        (named, None),
        ({"films": plain[0]}, plain[1]),
    ):
        trainer = EnsembleTrainer(
            model=toy.bert(2),
            args=TrainingArguments(output_dir=str(tmp_path), **BASE),
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=toy.tokenizer(),
        )
        traces.append(trace(trainer))
    for other in traces[1:]:
        assert_same(traces[0], other)


def test_a_dict_of_one_and_arguments_of_the_parent(tmp_path, base_folder):
    traces = []
    for train, args in (
        (ROWS["train"], SFTConfig(output_dir=str(tmp_path), **SFT_BASE)),
        ({"sums": ROWS["train"]}, SFTConfig(output_dir=str(tmp_path), **SFT_BASE)),
        (DatasetDict(sums=ROWS["train"]), EnsembleSFTConfig(output_dir=str(tmp_path), **SFT_BASE)),
        ({"sums": {"train": ROWS["train"]}}, EnsembleSFTConfig(output_dir=str(tmp_path), **SFT_BASE)),
    ):
        trainer = EnsembleSFTTrainer(base_folder, args, train_dataset=train, eval_dataset=ROWS["test"])
        assert trainer.trains_directly and isinstance(trainer.args, EnsembleSFTConfig)
        traces.append(trace(trainer))
    for other in traces[1:]:
        assert_same(traces[0], other)


def test_what_the_parent_does_not_need(tmp_path, base_folder):
    """No evaluation rows, no arguments, no target of a selection."""
    trainer = EnsembleSFTTrainer(base_folder, train_dataset=ROWS["train"], args=SFTConfig(str(tmp_path), **SFT_BASE))
    assert trainer.eval_dataset is None
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    args = SFTConfig(str(tmp_path), **SFT_BASE)
    trainer = SelectionSFTTrainer(model, args, train_dataset=ROWS["train"], processing_class=toy.tokenizer())
    assert trainer.train().global_step == 3
    trainer.save_model(str(tmp_path / "saved"))
    assert {"config.json", "model.safetensors", "tokenizer.json", "training_args.bin"} <= {
        path.name for path in (tmp_path / "saved").iterdir()
    }
    assert trainer.predict(trainer.train_dataset).metrics["test_loss"] > 0
    with pytest.raises(ConfigurationError, match="dict of at least two datasets"):
        trainer.capture()
    args = TrainingArguments(str(tmp_path), **BASE)
    trainer = SelectionTrainer(toy.bert(2), args, train_dataset=tokens()["train"], processing_class=toy.tokenizer())
    assert trainer.train().global_step == 3


def test_a_model_that_is_made_by_a_function(tmp_path):
    """For one dataset as the parent makes it; for several, with an adapter of its own or of `peft_config`."""
    rows, traces = tokens(), []
    for trainer_class, config_class in ((Trainer, TrainingArguments), (EnsembleTrainer, EnsembleConfig)):
        trainer = trainer_class(
            args=config_class(output_dir=str(tmp_path), **BASE),
            train_dataset=rows["train"],
            eval_dataset=rows["validation"],
            processing_class=toy.tokenizer(),
            model_init=lambda: toy.bert(2),
        )
        traces.append(trace(trainer))
    assert_same(*traces)
    tasks = {name: own["train"] for name, own in toy.text_tasks().items()}
    args = EnsembleConfig(str(tmp_path), **BASE)
    for make, peft in ((lambda: toy.bert(4), toy.lora("SEQ_CLS")), (lambda: toy.with_lora(toy.bert(4)), None)):
        given = {"processing_class": toy.tokenizer(), "peft_config": peft, "model_init": make}
        assert not EnsembleTrainer(args=args, train_dataset=tasks, **given).trains_directly


@pytest.mark.parametrize(
    ("parent", "ours"), [(Trainer, MultiTaskTrainer), (SFTTrainer, MultiTaskSFTTrainer)], ids=["trainer", "sft"]
)
def test_the_parents_arguments_are_in_its_order(parent, ours):
    expected, found = ([*inspect.signature(own.__init__).parameters] for own in (parent, ours))
    assert found[: len(expected)] == expected
    assert {*found[len(expected) :]} <= {"peft_config", "kwargs"}


def test_arguments_may_be_given_by_position(tmp_path, base_folder):
    calls = []

    def loss(outputs, labels, num_items_in_batch=None):
        calls.append(len(labels))
        return outputs["logits"].float().square().mean()

    args = SFTConfig(str(tmp_path), **SFT_BASE)
    several = {name: own["train"] for name, own in toy.sft_tasks().items()}
    # Rows of one dataset, of several without an adapter, and of a run.
    for rows, peft in ((ROWS["train"], toy.lora()), (several, None), (several, toy.lora())):
        trainer = EnsembleSFTTrainer(base_folder, args, None, rows, None, None, loss, peft_config=peft)
        assert trainer.compute_loss_func is loss
    trainer = EnsembleSFTTrainer(base_folder, args, None, ROWS["train"], None, None, loss)
    assert trainer.train().global_step == 3 and calls
    given = (None, tokens()["train"], None, toy.tokenizer(), None, loss)
    trainer = EnsembleTrainer(toy.bert(2), TrainingArguments(str(tmp_path), **BASE), *given)
    assert trainer.compute_loss_func is loss and trainer.train().global_step == 3


def test_arguments_of_the_user_stay_as_they_are(tmp_path, base_folder):
    """One object serves a run over several datasets and a training over one, each with its own learning rate."""
    args = EnsembleSFTConfig(str(tmp_path), **{name: own for name, own in SFT_BASE.items() if name != "learning_rate"})
    several = {name: own["train"] for name, own in toy.sft_tasks().items()}
    run = EnsembleSFTTrainer(base_folder, args, train_dataset=several, peft_config=toy.lora())
    alone = EnsembleSFTTrainer(base_folder, args, train_dataset=ROWS["train"], peft_config=toy.lora())
    assert (run.args.learning_rate, alone.args.learning_rate, args.learning_rate) == (2e-4, 2e-5, None)
