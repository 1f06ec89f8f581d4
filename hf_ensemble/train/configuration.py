"""What a run is compared by when it is started again: its configuration and its choices, as JSON values."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from peft import PeftModel
from transformers import TrainingArguments

from ..capture import model_identity
from ..select import GroupingSettings, SelectionSettings
from ..tasks import TaskSet
from .credentials import is_secret_name, without_secrets

# Arguments that say where and how to report or how fast to go, not what to train.
_UNCOMPARED = ("output_dir", "run_name", "project", "disable_tqdm", "overwrite_run", "local_rank", "report_to")
_UNCOMPARED += ("per_device_eval_batch_size", "capture_batch_size", "capture_batch_tokens")
_UNCOMPARED += (
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
)
_UNCOMPARED_PREFIXES = ("hub_", "push_to_hub", "log_", "logging_", "save_", "ddp_", "trackio")
# Arguments that only the choice of groups or auxiliary tasks depends on.
_CHOICES = {own.name for settings in (GroupingSettings, SelectionSettings) for own in fields(settings)}
_CHOICES |= {"num_components", "ensemble_weights", "calibration_runs"}
# `TrainingArguments.to_dict` hides every value with such a name; these are tokens of the vocabulary.
_TEXT_TOKENS = ("eos_token", "pad_token")


def configuration_of(model: PeftModel, tasks: TaskSet, args: TrainingArguments, trainer_class: type) -> dict[str, Any]:
    """What every stage of a run depends on. Credentials among the arguments are left out."""
    arguments = {
        key: value
        for key, value in args.to_dict().items()
        if key not in (*_UNCOMPARED, *_CHOICES) and not key.startswith(_UNCOMPARED_PREFIXES)
    }
    arguments |= {key: getattr(args, key) for key in _TEXT_TOKENS if key in arguments}
    return {
        "trainer": trainer_class.__name__,
        "model": model_identity(model),
        "tasks": tasks.fingerprint,
        "sampling_weights": tasks.sampling_weights,
        "arguments": json_values(arguments),
    }


def choices_of(args: TrainingArguments) -> dict[str, Any]:
    """What only the choice of groups or tasks and the stages after it depend on."""
    return json_values({key: getattr(args, key) for key in sorted(_CHOICES) if hasattr(args, key)})


def json_values(data: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as JSON holds them: sets sorted, objects by their names, credentials left out."""
    return {str(key): _json_value(value) for key, value in data.items() if not is_secret_name(str(key))}


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, Mapping):
        return json_values(value)
    if isinstance(value, (set, frozenset)):
        return sorted(map(_json_value, value), key=str)
    if isinstance(value, (list, tuple)):
        return [_json_value(entry) for entry in value]
    return without_secrets(str(getattr(value, "value", value)))
