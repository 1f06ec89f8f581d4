"""What a run is compared by when it is started again: its configuration and its choices, as JSON values."""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from peft import PeftModel
from transformers import TrainingArguments

from ..capture import model_identity
from ..select import GroupingSettings, SelectionSettings
from ..tasks import TaskSet

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
# Names under which loaders and trackers take credentials: their values are never written.
_SECRET = re.compile(
    r"(^|_)(token|auth|authorization|password|passwd|secret|credentials?|cookies?|headers|api_key|access_key)$"
)


def configuration_of(model: PeftModel, tasks: TaskSet, args: TrainingArguments, trainer_class: type) -> dict[str, Any]:
    """What every stage of a run depends on. Credentials among the arguments are left out."""
    arguments = {
        key: value
        for key, value in args.to_dict().items()
        if key not in (*_UNCOMPARED, *_CHOICES) and not key.startswith(_UNCOMPARED_PREFIXES)
    }
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
    return {str(key): _json_value(value) for key, value in data.items() if not _SECRET.search(str(key).lower())}


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return _without_credentials(value)
    if isinstance(value, Mapping):
        return json_values(value)
    if isinstance(value, (set, frozenset)):
        return sorted(map(_json_value, value), key=str)
    if isinstance(value, (list, tuple)):
        return [_json_value(entry) for entry in value]
    return _without_credentials(str(getattr(value, "value", value)))


def _without_credentials(text: str) -> str:
    """A URL without its user and password; any other text as it is."""
    if "://" not in text or "@" not in text:
        return text
    parts = urlsplit(text)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
