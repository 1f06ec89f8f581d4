"""`fsdp` and `deepspeed`: the base sharded over the processes, once for all trainings of a run."""

import copy
import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from accelerate import PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    patch_environment,
    str_to_bool,
)
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ...errors import ConfigurationError
from ...logging import get_logger
from ...models.inputs import is_encoder_decoder
from ...models.sharding import is_sharded, shard_base, shard_base_by_zero
from .deepspeed_config import check_deepspeed_config
from .parent_arguments import refusal
from .supported import names_encoder_decoder

logger = get_logger(__name__)

# How a run is asked to shard its base.
Sharding = FullyShardedDataParallelPlugin | DeepSpeedPlugin

# What `accelerate launch` sets for a configuration with FSDP, and for one with DeepSpeed.
_LAUNCHED = "ACCELERATE_USE_FSDP"
_LAUNCHED_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"


def without_sharding(
    args: TrainingArguments, model: Any = None, peft_config: PeftConfig | None = None, quantization_config: Any = None
) -> tuple[TrainingArguments, Sharding | None]:
    """The arguments without `fsdp` and `deepspeed`, and the sharding that they or `accelerate launch` ask for.

    A run shards its model itself, before its first training: to accelerate, the processes share rows alone.

    Args:
        args (`TrainingArguments`): the arguments, which stay as they are.
        model (`str` or `nn.Module`, *optional*): the model that the trainer is given, which need not be loaded yet.
        peft_config (`PeftConfig`, *optional*): the adapter that it is asked for.
        quantization_config (*optional*): how it is asked to quantize the model, unless the arguments say so.

    Raises:
        `ConfigurationError`: for a sharding that a run cannot honour.
    """
    is_launched = bool(str_to_bool(os.environ.get(_LAUNCHED, "false")))
    has_fsdp, sharding = bool(args.fsdp or is_launched), args.deepspeed_plugin
    if not has_fsdp and sharding is None:
        return args, None
    # Arguments with deepspeed tell transformers to cut each model while it is loaded. The run cuts its base itself.
    unset_hf_deepspeed_config()
    if has_fsdp and sharding is not None:
        raise refusal("deepspeed beside fsdp", "each shards the base", "leave one of them out")
    if has_fsdp:
        sharding = _fsdp_plugin(args)
    else:
        _check_deepspeed(args)
    name = _name(sharding)
    if not args.accelerator_config.even_batches:
        because = "processes run a sharded model together, as often"
        raise refusal(f"{name} beside even_batches=False", because, "leave that out")
    loading = getattr(args, "model_init_kwargs", None) or {}
    _check_model(name, model, peft_config, bool(quantization_config or loading.get("quantization_config")))
    if args.world_size < 2:
        raise refusal(
            name, "it shards a model over processes, and there is one", "start several (torchrun --nproc_per_node 2)"
        )
    args = copy.copy(args)
    args.fsdp, args.fsdp_config, args.fsdp_plugin_args = None, None, None
    if not has_fsdp:
        _forget_deepspeed(args)
    return args, sharding


def as_not_launched() -> AbstractContextManager[None]:
    """While open, an `Accelerator` that is built knows nothing of the sharding that `accelerate launch` asks for."""
    return patch_environment(**{_LAUNCHED: "false", _LAUNCHED_DEEPSPEED: "false"})


def stop_averaging(model: nn.Module) -> None:
    """Take off the hooks by which `Trainer` averages the gradients of parameters that every process holds whole.

    They communicate at every backward pass, also of a process that runs the model alone once its training is over.
    """
    averaging = Trainer._sync_replicated_trainable_parameters.__qualname__
    for parameter in model.parameters():
        if vars(parameter).pop("_replicated_grad_hook_registered", False):
            hooks = parameter._post_accumulate_grad_hooks
            for key in [key for key, hook in hooks.items() if hook.__qualname__.startswith(averaging)]:
                del hooks[key]


def _fsdp_plugin(args: TrainingArguments) -> FullyShardedDataParallelPlugin:
    if args.fsdp and args.fsdp_config.get("xla"):
        raise refusal("xla in fsdp_config", "it is not FSDP2", "leave it out")
    given = args.fsdp_plugin_args or {}
    if given.get("fsdp_version", int(os.environ.get("FSDP_VERSION", "1"))) != 2:
        raise refusal("version of fsdp_config", "FSDP1 flattens parameters", "set it to 2")
    plugin = FullyShardedDataParallelPlugin(**given)
    whole = "set it to false: each process reads the base into its own memory and keeps its shard on the device"
    for name, is_asked, because, instead in (
        ("cpu_ram_efficient_loading", plugin.cpu_ram_efficient_loading, "the other processes had no weights", whole),
        (
            "cpu_offload",
            isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "rows are put on the device of the first parameter",
            "leave it out, and shard over more processes",
        ),
        (
            "reshard_after_forward=False",
            not plugin.reshard_after_forward,
            "between passes every process has to hold its shard alone",
            "leave it out",
        ),
        (
            "activation_checkpointing in fsdp_config",
            plugin.activation_checkpointing,
            "its wrappers rename the adapter's parameters",
            "set gradient_checkpointing=True in the arguments",
        ),
        (
            "auto_wrap_policy SIZE_BASED_WRAP",
            plugin.auto_wrap_policy is size_based_auto_wrap_policy,
            "it gathers parts whose weights are read from outside",
            "set TRANSFORMER_BASED_WRAP, by layers",
        ),
        ("ignored_modules", plugin.ignored_modules, "adapters alone stay whole", "leave it out"),
    ):
        if is_asked:
            raise refusal(name, because, instead)
    return plugin


def _check_deepspeed(args: TrainingArguments) -> None:
    check_deepspeed_installed()
    check_deepspeed_config(args)
    if args.torch_compile:
        because = "hooks gather the base while it runs"
        raise refusal("deepspeed beside torch_compile", because, "leave one of them out")
    # What the process computes on is settled once, when DeepSpeed is imported.
    from deepspeed.accelerator import get_accelerator

    found = get_accelerator().device_name()
    if found != args.device.type:
        raise refusal(
            "deepspeed",
            f"DeepSpeed computes on {found!r}, and the arguments on {args.device.type!r}",
            f"set the environment variable DS_ACCELERATOR={args.device.type}",
        )


def check_deepspeed_installed() -> None:
    """Raise `ConfigurationError` where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise refusal(
            "deepspeed", "the package is not installed", "run pip install 'hf-ensemble[deepspeed]', or set fsdp=True"
        )


def _forget_deepspeed(args: TrainingArguments) -> None:
    args.deepspeed, args.deepspeed_plugin = None, None
    vars(args).pop("hf_deepspeed_config", None)
    if args.distributed_state.distributed_type == DistributedType.DEEPSPEED:
        # The state says so as long as it lives; the processes stay connected.
        del args._setup_devices
        with as_not_launched():
            args._setup_devices  # noqa: B018


def check_whole(model: PeftModel) -> None:
    """Raise `ConfigurationError` for a model that not every process holds whole."""
    if is_sharded(model) or getattr(model.get_base_model(), "is_distributed_loading_by_transformers", False):
        raise ConfigurationError(
            "Expected a model that every process holds whole, found one that is split over processes already (tp_plan, "
            "distributed_config, fully_shard, or loaded while arguments with deepspeed were there). Load it without, "
            "and set fsdp=True or deepspeed: the run shards its base itself."
        )


def shard(model: PeftModel, sharding: Sharding) -> None:
    """Shard a loaded model's base as it is asked for.

    Raises:
        `ConfigurationError`: for bases and adapters with which that cannot be done.
    """
    _check_model(_name(sharding), model)
    base, state = model.get_base_model(), PartialState()
    if isinstance(sharding, DeepSpeedPlugin):
        names = set(getattr(base, "_no_split_modules", None) or ())
        is_unit = lambda module: type(module).__name__ in names
        _warn_without_units(base, is_unit, "Without them only parts of it could be gathered one after the other.")
        shard_base_by_zero(model, state.device, is_unit)
        return
    sharding.set_auto_wrap_policy(base)
    is_unit = fsdp2_prepare_auto_wrap_policy(sharding, base) or (lambda module: False)
    if sharding.auto_wrap_policy is not None:
        _warn_without_units(base, is_unit, "Name their class in transformer_layer_cls_to_wrap of fsdp_config.")
    shard_base(model, init_device_mesh(state.device.type, (state.num_processes,)), is_unit)


def _warn_without_units(base: nn.Module, is_unit: Callable[[nn.Module], bool], instead: str) -> None:
    if not any(map(is_unit, base.modules())):
        logger.warning(
            "%s names no layers (_no_split_modules), so its whole body is gathered while it runs. %s",
            type(base).__name__,
            instead,
        )


def _name(sharding: Sharding) -> str:
    """The argument that asks for it."""
    return "deepspeed" if isinstance(sharding, DeepSpeedPlugin) else "fsdp"


def _check_model(name: str, model: Any, config: PeftConfig | None = None, is_quantized: bool = False) -> None:
    """Refuse a base, which need not be loaded yet, and an adapter, the model's own by default."""
    base = model
    if isinstance(model, PeftModel):
        base, config = model.get_base_model(), config or model.peft_config[model.active_adapters[0]]
    devices = getattr(base, "hf_device_map", None) or {}
    is_quantized = is_quantized or bool(getattr(base, "quantization_method", None))
    kind = config and config.peft_type
    is_pair = names_encoder_decoder(base) if isinstance(base, str) else base is not None and is_encoder_decoder(base)
    rows_alone = "share the rows alone (DDP)"
    for is_asked, because, instead in (
        (is_pair, "an encoder-decoder shares its embeddings among its parts", rows_alone),
        (is_quantized, "quantized weights are no tensors that can be cut", rows_alone),
        (len(set(devices.values())) > 1, "device_map has spread the base", "leave that out"),
        (
            config is not None and not isinstance(config, LoraConfig),
            f"{getattr(kind, 'value', kind)} was not seen to work with it",
            "use LoraConfig",
        ),
        (getattr(config, "use_dora", False), "use_dora reads whole weights of the base", "leave use_dora out"),
        (
            getattr(config, "target_parameters", None),
            "target_parameters are a part of the base's parameters",
            "name target_modules",
        ),
    ):
        if is_asked:
            raise refusal(name, because, instead)
