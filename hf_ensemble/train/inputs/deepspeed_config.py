"""What of a DeepSpeed configuration a run honours: ZeRO-3, of which each process holds an equal part of the base."""

from collections.abc import Iterator, Mapping
from typing import Any

from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

from .parent_arguments import refusal

_LEAVE_OUT = "leave it out"
# How DeepSpeed's engine goes about things, or what it prints: of no consequence to what a run finds.
_TUNING = {
    "dump_state",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}
_ZERO_TUNING = {
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "gather_16bit_weights_on_model_save",
    "ignore_unused_parameters",
    "load_from_fp32_weights",
    "log_trace_cache_warnings",
    "max_live_parameters",
    "max_reuse_distance",
    "memory_efficient_linear",
    "model_persistence_threshold",
    "overlap_comm",
    "param_persistence_threshold",
    "prefetch_bucket_size",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
}
# Compared with the arguments, as `Trainer` does.
_OF_THE_ARGUMENTS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
}
# Of sections that say what the arguments say, too.
_OPTIMIZER_PARAMS = {"lr", "betas", "eps", "weight_decay"}
_SCHEDULERS = {"warmuplr": "constant_with_warmup", "warmupdecaylr": "linear", "warmupcosinelr": "cosine"}
_REASONS = {
    "offload_param": ("rows are put on the device of the first parameter", "shard over more processes"),
    "offload_optimizer": ("an adapter's optimizer is small, and each training has its own", _LEAVE_OUT),
    "fp16": (
        "DeepSpeed would cast the base and scale losses by itself",
        "set its enabled to 'auto', and bf16=True or fp16=True in the arguments",
    ),
    **dict.fromkeys(
        ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"),
        ("captured gradients are those of the base's own weights", _LEAVE_OUT),
    ),
    **dict.fromkeys(
        ("zero_hpz_partition_size", "mics_shard_size"), ("every process holds an equal part of the base", _LEAVE_OUT)
    ),
}
# Values by which DeepSpeed turns something off, beside those that are none.
_OFF = {"zero_hpz_partition_size": 1, "mics_shard_size": -1}
_OTHER = ("it belongs to DeepSpeed's engine, and trainings of a run have none", _LEAVE_OUT)


def check_deepspeed_config(args: TrainingArguments) -> None:
    """Refuse what a run cannot honour of the configuration in the arguments, or of `accelerate launch`.

    Raises:
        `ConfigurationError`: which names what was found.
    """
    plugin: DeepSpeedPlugin = args.deepspeed_plugin
    given = HfDeepSpeedConfig(args.deepspeed) if args.deepspeed else plugin.hf_ds_config
    filled = HfTrainerDeepSpeedConfig(given.config)
    filled.trainer_config_process(args)
    unset_hf_deepspeed_config()
    zero = given.config.get("zero_optimization") or {}
    if zero.get("stage") != 3:
        raise refusal(
            f"stage {zero.get('stage', 0)} of zero_optimization in deepspeed",
            "it leaves the base whole on every process, and of what it shares out an adapter has little",
            "set it to 3, or leave deepspeed out",
        )
    refused = [*_refused_sections(given.config, args), *_not_off(zero, _ZERO_TUNING | {"stage"})]
    # "auto" is what the arguments say, and trainings of a run scale losses by those.
    if given.get_value("fp16.enabled") != "auto" and given.is_true("fp16.enabled"):
        refused.append("fp16")
    if refused:
        raise refusal(f"{refused[0]} in deepspeed", *_REASONS.get(refused[0], _OTHER))
    if filled.mismatches:
        raise refusal(
            "deepspeed",
            "it differs from the arguments: " + "; ".join(own.strip("- ") for own in filled.mismatches),
            "set these values of it to 'auto'",
        )


def _refused_sections(config: Mapping[str, Any], args: TrainingArguments) -> Iterator[str]:
    own = {"zero_optimization", "optimizer", "scheduler", "fp16"}
    yield from _not_off(config, _TUNING | _OF_THE_ARGUMENTS | own)
    optimizer = config.get("optimizer") or {}
    is_adamw = str(optimizer.get("type", "")).lower() == "adamw" and str(args.optim.value).startswith("adamw")
    if optimizer and not (is_adamw and set(optimizer.get("params") or ()) <= _OPTIMIZER_PARAMS):
        yield "optimizer"
    scheduler = config.get("scheduler") or {}
    kind = _SCHEDULERS.get(str(scheduler.get("type", "")).lower())
    is_auto = all(value == "auto" for value in (scheduler.get("params") or {}).values())
    if scheduler and not (is_auto and kind == str(args.lr_scheduler_type.value)):
        yield "scheduler"


def _not_off(section: Mapping[str, Any], known: set[str]) -> list[str]:
    """Names in a section that are not known and turn something on."""
    return [name for name, value in section.items() if name not in known and not _is_off(name, value)]


def _is_off(name: str, value: Any) -> bool:
    if isinstance(value, Mapping):
        return not value or value.get("enabled") is False or value.get("device") == "none"
    return not value or value == "none" or value == _OFF.get(name)
