"""What of `fsdp` a run honours, and what it refuses before the model is loaded."""

import os
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import LoraConfig, VeraConfig, get_peft_model
from transformers import Trainer

from helpers import toy
from helpers.trainers import sft_config, sft_trainer
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.models import batches
from hf_ensemble.train.inputs.sharding import check_whole, shard, stop_averaging, without_sharding

LAUNCHED = "ACCELERATE_USE_FSDP"


@pytest.fixture
def two_processes(monkeypatch):
    for name in (LAUNCHED, "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "false")
    monkeypatch.setattr("transformers.TrainingArguments.world_size", 2)


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


def test_fsdp_of_the_launcher_is_there_for_the_next_run(two_processes, tmp_path, base_folder, monkeypatch):
    for name, value in {LAUNCHED: "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    sharded = []
    monkeypatch.setattr("hf_ensemble.train.multi_task_mixin.shard", lambda model, plugin: sharded.append(model))
    for folder in ("first", "second"):
        trainer = sft_trainer(tmp_path / folder, base_folder)
        # To accelerate, the trainings are those of processes that share rows.
        assert getattr(trainer.accelerator.state, "fsdp_plugin", None) is None
        assert sharded.pop() is trainer.model and os.environ[LAUNCHED] == "true"


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


@pytest.mark.parametrize(
    ("config", "named", "remedy"),
    [
        ({"xla": True}, "xla in fsdp_config", "leave it out"),
        ({"version": 1}, "version of fsdp_config", "set it to 2"),
        ({"cpu_ram_efficient_loading": True}, "cpu_ram_efficient_loading", "set it to false"),
        ({"cpu_offload": True}, "cpu_offload", "more processes"),
        ({"reshard_after_forward": False}, "reshard_after_forward=False", "leave it out"),
        ({"activation_checkpointing": True}, "activation_checkpointing", "gradient_checkpointing=True"),
        ({"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 1}, "SIZE_BASED_WRAP", "TRANSFORMER_BASED_WRAP"),
    ],
)
def test_what_a_run_cannot_honour_is_refused_by_name(two_processes, config, named, remedy, tmp_path):
    with pytest.raises(ConfigurationError, match=f"{named}.* cannot be honoured .*Please .*{remedy}"):
        without_sharding(sft_config(tmp_path, fsdp=True, fsdp_config=config))


def test_processes_that_run_batches_unevenly_are_refused(two_processes, tmp_path):
    args = sft_config(tmp_path, fsdp=True, accelerator_config={"even_batches": False})
    with pytest.raises(ConfigurationError, match="^fsdp beside even_batches=False cannot be honoured"):
        without_sharding(args)


def test_one_process_has_nothing_to_shard_over(tmp_path, base_folder):
    with pytest.raises(ConfigurationError, match="^fsdp cannot be honoured .* there is one. Please start several"):
        sft_trainer(tmp_path, base_folder, fsdp=True)


@pytest.mark.parametrize(
    ("make", "because"),
    [
        (lambda: toy.with_lora(toy.llama(), use_dora=True), "use_dora"),
        (lambda: get_peft_model(toy.llama(), VeraConfig(target_modules=["q_proj"], r=2)), "VERA"),
        (
            lambda: get_peft_model(toy.llama(), LoraConfig(target_parameters=["layers.0.mlp.up_proj.weight"])),
            "target_parameters",
        ),
    ],
)
def test_adapters_that_read_the_base_are_refused(make, because, two_processes, tmp_path):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    with pytest.raises(ConfigurationError, match=f"^fsdp cannot be honoured .*{because}"):
        shard(make(), plugin)
    # Once it is asked for: the base may take long to load.
    with pytest.raises(ConfigurationError, match=f"^fsdp cannot be honoured .*{because}"):
        without_sharding(sft_config(tmp_path, fsdp=True), "base", make().peft_config["default"])


def test_models_that_are_split_already_are_refused():
    model = toy.with_lora(toy.llama())
    check_whole(model)
    model.get_base_model()._is_distributed_loading_by_transformers = True
    with pytest.raises(ConfigurationError, match="tp_plan.*set fsdp=True"):
        check_whole(model)


def test_a_base_that_is_quantized_or_spread_is_refused():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    for name, value in {"quantization_method": "bitsandbytes", "hf_device_map": {"a": 0, "b": 1}}.items():
        model = toy.with_lora(toy.llama())
        setattr(model.get_base_model(), name, value)
        with pytest.raises(ConfigurationError, match="^fsdp cannot be honoured"):
            shard(model, plugin)


def test_a_base_that_is_to_be_quantized_is_refused(two_processes, tmp_path):
    asked = {"load_in_8bit": True}
    for quantization, loading in ((asked, {}), (None, {"quantization_config": asked})):
        args = sft_config(tmp_path, fsdp=True, model_init_kwargs=loading)
        with pytest.raises(ConfigurationError, match="^fsdp cannot be honoured .*quantized weights"):
            without_sharding(args, "base", toy.lora(), quantization)


def test_processes_that_run_a_model_together_do_not_halve_batches(monkeypatch):
    calls = []

    def full(rows):
        calls.append(rows)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(batches, "is_sharded", lambda model: True)
    with pytest.raises(torch.OutOfMemoryError):
        batches.HalvingOnFullMemory(full, torch.nn.Linear(1, 1))([1, 2])
    assert calls == [[1, 2]]
