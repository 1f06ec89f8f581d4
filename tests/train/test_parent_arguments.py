"""Every argument of the parents is used, refused by name, or of no consequence in the parents too."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
from transformers import TrainingArguments
from trl import SFTConfig

from helpers import toy
from helpers.trainers import sft_config, sft_trainer, split, text_trainer
from hf_ensemble import (
    EnsembleConfig,
    EnsembleSFTConfig,
    EnsembleSFTTrainer,
    EnsembleTrainer,
    SelectionConfig,
    SelectionSFTConfig,
    SelectionSFTTrainer,
    SelectionTrainer,
)
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.runs import TrainedAdapter
from hf_ensemble.train import outcome
from hf_ensemble.train.inputs.parent_arguments import REFUSED, check_parent_arguments


def words(text):
    return text.split()


# What each training's trainer is given as it is.
USED = words("""
    per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
    warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules
    gradient_accumulation_steps average_tokens_across_devices max_grad_norm label_smoothing_factor bf16 fp16
    tf32 activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
    gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode use_liger_kernel
    liger_kernel_config use_cache neftune_noise_alpha torch_empty_cache_steps logging_strategy logging_steps
    logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only
    eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics
    batch_eval_metrics save_strategy save_steps save_on_each_node save_total_limit load_best_model_at_end
    greater_is_better ignore_data_skip full_determinism seed data_seed
    use_cpu accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    dataloader_in_order remove_unused_columns label_names train_sampling_strategy ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout debug skip_memory_metrics
    local_rank trust_remote_code router_aux_loss_coef dataset_num_proc eos_token pad_token max_length
    truncation_mode shuffle_dataset pad_to_multiple_of completion_only_loss assistant_only_loss loss_type
    activation_offloading packing packing_strategy eval_packing padding_free
""")
# What the run itself uses, and each training otherwise or not at all.
USED_BY_RUN = words("""
    output_dir push_to_hub hub_model_id hub_token hub_private_repo hub_revision hub_strategy model_init_kwargs
    chat_template_path dataset_kwargs dataset_text_field metric_for_best_model fsdp fsdp_config deepspeed
""")
# Of no consequence here, for the reason given.
IRRELEVANT = {
    "do_train": "read by scripts alone",
    "do_eval": "read by scripts alone",
    "do_predict": "read by scripts alone",
    "hub_always_push": "every upload is waited for",
    "restore_callback_states_from_checkpoint": "a training that goes on always restores them",
    "length_column_name": "rows carry no such column: lengths are those of the tokens, as in the parents then",
}
# Values that are refused, and what the message says beside the name.
REFUSED_VALUES = {
    "auto_find_batch_size": (True, "per_device_train_batch_size"),
    "save_only_model": (True, "could not resume"),
    "enable_jit_checkpoint": (True, "save_steps"),
    "resume_from_checkpoint": ("out/checkpoint-5", "resumes by itself"),
    "bf16_full_eval": (True, "casts the base model"),
    "fp16_full_eval": (True, "casts the base model"),
    "parallelism_config": (SimpleNamespace(tp_size=2), "DDP"),
}
TRAINERS = {
    EnsembleConfig: (EnsembleTrainer, toy.text_tasks()),
    EnsembleSFTConfig: (EnsembleSFTTrainer, toy.sft_tasks()),
    SelectionConfig: (SelectionTrainer, toy.text_tasks()),
    SelectionSFTConfig: (SelectionSFTTrainer, toy.sft_tasks()),
}
CONFIGS = list(TRAINERS)


@pytest.mark.parametrize("parent", [TrainingArguments, SFTConfig])
def test_every_argument_of_the_parents_has_its_place(parent):
    names = {field.name for field in fields(parent)}
    placed = [*USED, *USED_BY_RUN, *IRRELEVANT, *(name for name in REFUSED_VALUES if name not in USED)]
    assert len(placed) == len(set(placed))
    assert sorted(names - set(placed)) == [], "new arguments: are they used, refused or irrelevant?"
    assert parent is TrainingArguments or sorted(set(placed) - names) == [], "arguments that are gone"
    assert set(REFUSED) == set(REFUSED_VALUES)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", REFUSED_VALUES)
def test_what_cannot_be_honoured_is_refused_by_name(config, name, tmp_path, monkeypatch):
    """Before the model is loaded, and only where there are several datasets and an adapter."""
    if name not in {field.name for field in fields(config)}:
        pytest.skip("not an argument of this parent")
    value, message = REFUSED_VALUES[name]
    args = config(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    setattr(args, name, value)
    trainer_class, tasks = TRAINERS[config]
    options = {"target": next(iter(tasks))} if "Selection" in config.__name__ else {}
    with pytest.raises(ConfigurationError, match=f"^{name}=.* cannot be honoured .*: .*\\. Please") as caught:
        trainer_class("no model", args, train_dataset=split(tasks, "train"), peft_config=toy.lora(), **options)
    assert message in str(caught.value)


def test_checkpoints_are_no_part_of_an_upload(tmp_path):
    for strategy in ("checkpoint", "all_checkpoints"):
        with pytest.raises(ConfigurationError, match="^hub_strategy='.*checkpoint.*Please set it to 'end'"):
            check_parent_arguments(sft_config(tmp_path, push_to_hub=True, hub_strategy=strategy))
        check_parent_arguments(sft_config(tmp_path, hub_strategy=strategy))


def test_each_training_is_given_the_arguments_that_are_used(tmp_path, base_folder):
    trainer = sft_trainer(tmp_path / "run", base_folder, data_seed=3, run_name="mine", save_total_limit=2)
    trainer.open_run()
    begun = TrainedAdapter("x", {"sums": 1.0}, trainer.args.seed, theta0="")
    inner = trainer.flow.training.make_trainer(begun, trainer.train_dataset)
    assert {name: getattr(inner.args, name) for name in USED} == {name: getattr(trainer.args, name) for name in USED}
    assert not inner.args.push_to_hub and inner.args.output_dir.endswith("training/x")


def test_dropping_the_last_batch_leaves_each_task_one(tmp_path, base_folder):
    changes = {"dataloader_drop_last": True, "per_device_train_batch_size": 5}
    trainer = sft_trainer(tmp_path / "run", base_folder, num_groups=3, num_train_epochs=1, **changes)
    trainer.open_run()
    # 12 rows of a task, 36 of all.
    assert trainer.flow.training.num_steps(["sums"]) == 2 and trainer.flow.training.num_steps(trainer.tasks.names) == 7
    trained = trainer.flow.training.run("one", ["sums"], tmp_path / "one")
    assert trained.global_step == 2
    with pytest.raises(ConfigurationError, match="expected at least 13 rows of each task, found 12"):
        sft_trainer(tmp_path / "bad", base_folder, **{**changes, "per_device_train_batch_size": 13})


def test_unused_columns_may_stay(tmp_path, base_folder):
    changes = {"remove_unused_columns": False, "num_groups": 2, "num_train_epochs": 1}
    expected = sft_trainer(tmp_path / "plain", base_folder, **{**changes, "remove_unused_columns": True}).train()
    found = sft_trainer(tmp_path / "kept", base_folder, **changes).train()
    assert found.metrics["eval_mean_loss"] == expected.metrics["eval_mean_loss"]
    text_trainer(tmp_path / "text", toy.bert(4), toy.text_tasks(), **changes).train()


@pytest.fixture
def uploads(monkeypatch):
    """Uploads in place of a Hub, which is down while `uploads.error` is set."""
    record = SimpleNamespace(calls=[], error=None)

    def upload(*args, **kwargs):
        if record.error is not None:
            raise record.error
        record.calls.append((*args, kwargs))

    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda self, token=None, private=None: None)
    monkeypatch.setattr(outcome, "push_run_to_hub", upload)
    return record


HUB = {
    "push_to_hub": True,
    "hub_model_id": "me/mine",
    "hub_private_repo": True,
    "hub_token": "hf_x",
    "hub_revision": "draft",
}
SENT = {
    "commit_message": "End of training",
    "token": "hf_x",
    "private": True,
    "revision": "draft",
    "again": "trainer.push_to_hub()",
}


def test_push_to_hub_uploads_the_finished_ensemble(tmp_path, base_folder, uploads, caplog):
    changes = {"num_groups": 1, "num_train_epochs": 1, **HUB}
    trainer = sft_trainer(tmp_path / "run", base_folder, **changes)
    uploads.error = ConnectionError("the Hub is down")
    output = trainer.train()
    # Reported, and nothing is lost.
    (message,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR" and "hf_ensemble" in r.name]
    assert "is complete, but was not uploaded: ConnectionError: the Hub is down" in message
    assert output.metrics["eval_mean_loss"] > 0 and uploads.calls == []
    uploads.error = None
    sft_trainer(tmp_path / "run", base_folder, **changes).train()
    assert uploads.calls == [
        (trainer.run_directory.path, "me/mine", {**SENT, "metadata": {}, "folder": trainer.run_directory.ensemble})
    ]
    trainer.save_model()
    assert uploads.calls[1][-1] == {
        **SENT,
        "metadata": {},
        "folder": trainer.run_directory.ensemble,
        "commit_message": "Model save",
    }
    trainer.push_to_hub(dataset_name="sums", tags="mine", model_name="unused")
    assert uploads.calls[2][-1]["metadata"] == {"datasets": ["sums"], "tags": ["mine"]}


def test_push_to_hub_uploads_the_adapter_of_a_selection(tmp_path, base_folder, uploads):
    tasks = toy.sft_tasks()
    trainer = SelectionSFTTrainer(
        model=base_folder,
        args=sft_config(tmp_path / "run", SelectionSFTConfig, max_auxiliary=1, num_train_epochs=1, **HUB),
        train_dataset=split(tasks, "train"),
        eval_dataset=split(tasks, "validation"),
        peft_config=toy.lora(),
        target="sums",
    )
    trainer.train()
    assert uploads.calls == [
        (trainer.run_directory.path, "me/mine", {**SENT, "metadata": {}, "folder": trainer.run_directory.adapter})
    ]
