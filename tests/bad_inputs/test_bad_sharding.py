"""What of `fsdp` is refused, before the model is loaded where that is known by then."""

import pytest
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import LoraConfig, VeraConfig, get_peft_model

from helpers import toy
from helpers.trainers import sft_config
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.train.inputs.sharding import check_whole, shard, without_sharding


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
