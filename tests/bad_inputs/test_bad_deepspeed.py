"""What of `deepspeed` is refused, before the model is loaded."""

import json

import pytest
from peft import VeraConfig

from helpers import toy
from helpers.deepspeed import ZERO, needs_deepspeed
from helpers.trainers import sft_config
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.train.inputs.sharding import without_sharding

OPTIMIZER = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
SCHEDULER = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto", "total_num_steps": "auto"}}


def zero(**changes):
    return ZERO | {"zero_optimization": {"stage": 3, **changes}}


@needs_deepspeed
@pytest.mark.parametrize(
    ("config", "named", "remedy"),
    [
        (zero(stage=2), "stage 2 of zero_optimization", "set it to 3"),
        (ZERO | {"zero_optimization": {}}, "stage 0 of zero_optimization", "set it to 3"),
        (zero(offload_param={"device": "cpu"}), "offload_param", "more processes"),
        (zero(offload_param={"device": "nvme", "nvme_path": "/x"}), "offload_param", "more processes"),
        (zero(offload_optimizer={"device": "cpu"}), "offload_optimizer", "leave it out"),
        (zero(zero_quantized_weights=True), "zero_quantized_weights", "leave it out"),
        (zero(zero_hpz_partition_size=2), "zero_hpz_partition_size", "leave it out"),
        (zero(stage3_leaf_modules=["X"]), "stage3_leaf_modules", "leave it out"),
        (ZERO | {"fp16": {"enabled": True}}, "fp16", "enabled to 'auto', and bf16=True"),
        (ZERO | {"optimizer": {"type": "Lion"}}, "optimizer", "leave it out"),
        (ZERO | {"optimizer": OPTIMIZER | {"params": {"torch_adam": True}}}, "optimizer", "leave it out"),
        (ZERO | {"scheduler": SCHEDULER | {"type": "OneCycle"}}, "scheduler", "leave it out"),
        (ZERO | {"scheduler": SCHEDULER | {"params": {"warmup_num_steps": 3}}}, "scheduler", "leave it out"),
        (ZERO | {"activation_checkpointing": {"partition_activations": True}}, "activation_checkpointing", "leave it"),
        (ZERO | {"train_micro_batch_size_per_gpu": 77}, "train_micro_batch_size_per_gpu=77 vs hf", "to 'auto'"),
        (ZERO | {"gradient_clipping": 0.5}, "gradient_clipping=0.5 vs hf max_grad_norm=1.0", "to 'auto'"),
        (ZERO | {"bf16": {"enabled": True}}, "bf16.enabled=True vs hf", "to 'auto'"),
    ],
)
def test_what_a_run_cannot_honour_is_refused_by_name(two_processes, config, named, remedy, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    for given in (config, str(path)):
        with pytest.raises(ConfigurationError, match=f"{named}.*Please .*{remedy}") as caught:
            without_sharding(sft_config(tmp_path, deepspeed=given))
        assert "deepspeed" in str(caught.value) and "cannot be honoured" in str(caught.value)


@needs_deepspeed
@pytest.mark.parametrize(
    ("arguments", "given", "named"),
    [
        ({"accelerator_config": {"even_batches": False}}, (), "deepspeed beside even_batches=False"),
        ({"fsdp": True, "fsdp_config": {"version": 2}}, (), "deepspeed beside fsdp"),
        ({"torch_compile": True}, (), "deepspeed beside torch_compile"),
        ({}, ("base", VeraConfig(target_modules=["q_proj"], r=2)), "deepspeed .*VERA"),
        ({}, ("base", toy.lora(), {"load_in_4bit": True}), "deepspeed .*quantized weights"),
    ],
)
def test_what_does_not_go_with_it_is_refused(two_processes, arguments, given, named, tmp_path):
    with pytest.raises(ConfigurationError, match=f"^{named}.*Please"):
        without_sharding(sft_config(tmp_path, deepspeed=ZERO, **arguments), *given)


@needs_deepspeed
def test_one_process_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match="^deepspeed cannot be honoured .* there is one. Please start several"):
        without_sharding(sft_config(tmp_path, deepspeed=ZERO))


@needs_deepspeed
def test_another_device_than_that_of_the_arguments_is_refused(two_processes, tmp_path, monkeypatch):
    monkeypatch.setattr("deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.device_name", lambda own: "cuda")
    with pytest.raises(ConfigurationError, match="DeepSpeed computes on 'cuda'.*Please set .* DS_ACCELERATOR=cpu"):
        without_sharding(sft_config(tmp_path, deepspeed=ZERO))


def test_without_the_package_the_arguments_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="not installed.*Please run pip install 'hf-ensemble\\[deepspeed\\]'"):
        sft_config(tmp_path, deepspeed=ZERO)
