"""What of `fsdp` a run honours."""

import os
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

from helpers import toy
from helpers.deepspeed import needs_deepspeed
from helpers.trainers import sft_config, sft_trainer
from hf_ensemble.models import batches
from hf_ensemble.train.inputs.sharding import stop_averaging, without_sharding

LAUNCHED = "ACCELERATE_USE_FSDP"


def test_trainings_are_given_arguments_without_fsdp(two_processes, tmp_path):
    config = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    args = sft_config(tmp_path, fsdp=True, fsdp_config=config)
    own, plugin = without_sharding(args)
    assert (own.fsdp, own.fsdp_config, own.fsdp_plugin_args) == (None, None, None)
    assert args.fsdp and plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]
    assert without_sharding(own) == (own, None)


def test_fsdp_of_the_launcher_is_honoured(two_processes, tmp_path, monkeypatch):
    for name, value in {LAUNCHED: "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}.items():
        monkeypatch.setenv(name, value)
    _, plugin = without_sharding(sft_config(tmp_path))
    assert plugin.auto_wrap_policy is None


@pytest.mark.parametrize(
    ("launched_by", "setting"),
    [
        (LAUNCHED, ("FSDP_VERSION", "2")),
        pytest.param(
            "ACCELERATE_USE_DEEPSPEED", ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3"), marks=needs_deepspeed, id="deepspeed"
        ),
    ],
)
def test_sharding_of_the_launcher_is_there_for_the_next_run(
    launched_by, setting, two_processes, tmp_path, base_folder, monkeypatch
):
    for name, value in ((launched_by, "true"), setting):
        monkeypatch.setenv(name, value)
    sharded, launched, make = [], [], Trainer.create_accelerator_and_postprocess

    def recorded(trainer):
        launched.append(os.environ[launched_by])
        make(trainer)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", recorded)
    monkeypatch.setattr("hf_ensemble.train.multi_task_mixin.shard", lambda model, sharding: sharded.append(model))
    for folder in ("first", "second"):
        trainer = sft_trainer(tmp_path / folder, base_folder)
        # To accelerate, the trainings are those of processes that share rows.
        assert launched.pop() == "false" and not launched
        assert sharded.pop() is trainer.model and os.environ[launched_by] == "true"


def test_gradients_are_averaged_while_a_training_goes_on(monkeypatch):
    model = toy.with_lora(toy.llama())
    parameters = [own for own in model.parameters() if own.requires_grad]
    seen = []
    parameters[0].register_post_accumulate_grad_hook(seen.append)
    for name, value in {"is_available": True, "is_initialized": True, "get_world_size": 2, "broadcast": None}.items():
        monkeypatch.setattr(f"torch.distributed.{name}", lambda *args, value=value, **kwargs: value)
    for _ in range(2):
        Trainer._sync_replicated_trainable_parameters(SimpleNamespace(), model)
        assert all(own._post_accumulate_grad_hooks for own in parameters)
        stop_averaging(model)
    # One that is left would ask the trainer for its accelerator.
    ids = torch.tensor([[3, 4, 5]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(seen) == 1 and all(own.grad is not None for own in parameters)


def test_processes_that_run_a_model_together_do_not_halve_batches(monkeypatch):
    calls = []

    def full(rows):
        calls.append(rows)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(batches, "is_sharded", lambda model: True)
    with pytest.raises(torch.OutOfMemoryError):
        batches.HalvingOnFullMemory(full, torch.nn.Linear(1, 1))([1, 2])
    assert calls == [[1, 2]]
