"""Arguments of `TrainingArguments` and `SFTConfig` that a run of several trainings does not take."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from ...errors import ConfigurationError


@dataclass(frozen=True)
class Refusal:
    """What a run does not take of an argument.

    Args:
        because (`str`): the reason.
        instead (`str`): what to do.
        values (`Sequence`, *optional*): the values that it does not take; all that turn something on by default.
    """

    because: str
    instead: str
    values: Sequence[Any] | None = None


_FULL_EVAL = Refusal("it casts the base model, which all trainings share", "evaluate in mixed precision with bf16=True")
REFUSED: dict[str, Refusal] = {
    "auto_find_batch_size": Refusal(
        "each training would find a batch size of its own, and predictions are of one batch size",
        "set per_device_train_batch_size and gradient_accumulation_steps",
    ),
    "save_only_model": Refusal("a training that was killed could not resume", "set save_total_limit to save space"),
    "enable_jit_checkpoint": Refusal(
        "a training that it stops would count as finished", "set save_strategy='steps' and save_steps"
    ),
    "resume_from_checkpoint": Refusal(
        "a run consists of several trainings", "leave it out: a run that is started again resumes by itself"
    ),
    "bf16_full_eval": _FULL_EVAL,
    "fp16_full_eval": _FULL_EVAL,
    "parallelism_config": Refusal(
        "each row is captured and scored by a single process",
        "set fsdp=True, which shards the base, or share the rows alone (DDP)",
    ),
}
# Refused only beside `push_to_hub`, of which it says what to upload.
_HUB_STRATEGY = Refusal(
    "checkpoints of single trainings are not uploaded",
    "set it to 'end' to upload the result",
    ("checkpoint", "all_checkpoints"),
)


def check_parent_arguments(args: TrainingArguments) -> None:
    """Refuse what the parents take and a run cannot honour.

    Raises:
        `ConfigurationError`: which names the argument.
    """
    for name, own in {**REFUSED, **({"hub_strategy": _HUB_STRATEGY} if args.push_to_hub else {})}.items():
        value = getattr(args, name, None)
        value = getattr(value, "value", value)
        if value and (own.values is None or value in own.values):
            raise refusal(f"{name}={value!r}", own.because, own.instead)


def refusal(name: str, because: str, instead: str) -> ConfigurationError:
    """The error that names the argument, the reason and what to do."""
    return ConfigurationError(f"{name} cannot be honoured in a run of several trainings: {because}. Please {instead}.")
