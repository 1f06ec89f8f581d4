"""What a run is compared by when it is started again: its configuration and its choices, as JSON values."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import TrainingArguments

from .._values import identity_of
from ..capture import model_identity
from ..capture.config import ROW_LIMITS, FeatureSettings
from ..capture.row_sample import num_captured
from ..select import GroupingSettings, SelectionSettings
from ..tasks import TaskSet
from ..tasks.rows import token_fingerprint
from .credentials import is_secret_name, without_secrets
from .inputs.boosting import BoostingSettings

# Arguments that say where and how to report or how fast to go, not what to train.
_UNCOMPARED = ("output_dir", "run_name", "project", "disable_tqdm", "overwrite_run", "local_rank", "report_to")
# How many rows of streams are read: the rows themselves are compared.
_UNCOMPARED += ("streaming_rows",)
_UNCOMPARED += ("concurrent_groups",)
_UNCOMPARED += ("capture_batch_size", "capture_batch_tokens", "estimate_device")
_UNCOMPARED += (
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
    "dataset_num_proc",
)
# Which memory is saved, and what is measured.
_UNCOMPARED += (
    "gradient_checkpointing",
    "activation_checkpointing",
    "activation_offloading",
    "torch_empty_cache_steps",
)
_UNCOMPARED += ("eval_accumulation_steps", "eval_use_gather_object")
_UNCOMPARED += ("skip_memory_metrics", "include_num_input_tokens_seen")
# A training that is resumed always restores its callbacks, and one that is not killed has no rows to skip.
_UNCOMPARED += ("restore_callback_states_from_checkpoint", "ignore_data_skip")
# Read by scripts, and by nothing in these versions of the parents.
_UNCOMPARED += ("do_train", "do_predict", "length_column_name")
# What evaluations during trainings are of, and when they are made.
_OF_EVALUATIONS = (
    "per_device_eval_batch_size",
    "do_eval",
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "eval_on_start",
    "eval_packing",
    "eval_do_concat_batches",
    "batch_eval_metrics",
    "include_for_metrics",
    "prediction_loss_only",
    "greater_is_better",
)
_OF_CHECKPOINTS = ("save_strategy", "save_steps")
_UNCOMPARED_PREFIXES = ("card_", "hub_", "push_to_hub", "log_", "logging_", "save_", "ddp_", "trackio")
# Arguments of trainers, beside `args`, that decide what is trained.
_TRAINER_ARGUMENTS = ("data_collator", "compute_loss_func", "optimizer_cls_and_kwargs")
# Those that decide it where evaluations during a training do.
_METRICS = ("compute_metrics", "preprocess_logits_for_metrics")
# Arguments that only the choice of groups or auxiliary tasks depends on.
_CHOICES = {
    own.name for settings in (GroupingSettings, SelectionSettings, BoostingSettings) for own in fields(settings)
}
_CHOICES |= {"num_components", "ensemble_weights", "calibration_runs", "sequential_groups"}
# Arguments that only the gradients, and what is made from them, depend on.
_CAPTURE = {own.name for own in fields(FeatureSettings)}
# `TrainingArguments.to_dict` hides every value with such a name; these are tokens of the vocabulary.
_TEXT_TOKENS = ("eos_token", "pad_token")


def configuration_of(
    model: PeftModel,
    tasks: TaskSet,
    rows: Mapping[str, Dataset],
    args: TrainingArguments,
    trainer_class: type,
    trainer_arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """What every stage of a run depends on, and under `"capture"` what the gradients depend on beside.

    Credentials among the arguments are left out.

    Args:
        model (`PeftModel`): at theta0.
        tasks (`TaskSet`): the tasks.
        rows (`dict[str, Dataset]`): their rows as tokens.
        args (`TrainingArguments`): the trainer's arguments.
        trainer_class (`type`): the user's class of trainer.
        trainer_arguments (`dict`): what each training's trainer is constructed with beside.
    """
    left_out = {*_UNCOMPARED, *_CHOICES, *_CAPTURE} | ({*_OF_EVALUATIONS} if not _evaluations_decide(args) else set())
    deciding = _OF_CHECKPOINTS if args.load_best_model_at_end else ()
    arguments = {
        key: value
        for key, value in args.to_dict().items()
        if key in deciding or (key not in left_out and not key.startswith(_UNCOMPARED_PREFIXES))
    }
    arguments |= {key: getattr(args, key) for key in _TEXT_TOKENS if key in arguments}
    of_trainers = (*_TRAINER_ARGUMENTS, *(_METRICS if _evaluations_decide(args) else ()))
    return {
        "trainer": trainer_class.__name__,
        "model": model_identity(model),
        "tasks": tasks.fingerprint,
        "tokens": token_fingerprint(rows),
        "sampling_weights": tasks.sampling_weights,
        "arguments": json_values(arguments),
        "capture": json_values(_capture_of(tasks, args)),
        "trainer_arguments": json_values({key: trainer_arguments.get(key) for key in of_trainers}),
    }


def _evaluations_decide(args: TrainingArguments) -> bool:
    """Whether evaluations during a training decide which adapter is kept, when it ends, or how it goes on."""
    # Best adapters, early stopping and schedules are refused without a metric.
    return args.metric_for_best_model is not None or args.task_loss_weighting == "convergence"


def _capture_of(tasks: TaskSet, args: TrainingArguments) -> dict[str, Any]:
    """What gradients depend on beside; limits of rows that no task exceeds make no difference."""
    found = {name: getattr(args, name) for name in sorted(_CAPTURE)}
    for split, name in ROW_LIMITS.items():
        sizes = {task: len(rows) for task, rows in tasks.split(split).items()}
        captured = {task: num_captured(found[name], task, size) for task, size in sizes.items()}
        found[name] = {task: count for task, count in captured.items() if count < sizes[task]}
    if not any(found[name] for name in ROW_LIMITS.values()):
        # Nothing is drawn.
        del found["capture_seed"]
    return found


def choices_of(args: TrainingArguments) -> dict[str, Any]:
    """What only the choice of groups or tasks and the stages after it depend on."""
    return json_values({key: getattr(args, key) for key in sorted(_CHOICES) if hasattr(args, key)})


def json_values(data: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as JSON holds them: sets sorted, objects by their names, credentials left out."""
    return {str(key): _json_value(value) for key, value in data.items() if not is_secret_name(str(key))}


def _json_value(value: Any) -> Any:
    value = identity_of(value)
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return json_values(value)
    return [_json_value(entry) for entry in value] if isinstance(value, list) else value
