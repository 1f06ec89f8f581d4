"""Which systems an ensemble is compared with, and what each needs."""

from collections.abc import Sequence

from peft import LoraConfig, PeftModel

from ...errors import ConfigurationError
from ...tasks import TaskSet

# Name of each system, and whether it needs plain LoRA adapters.
_NEEDS_LORA = {
    "scaled": False,
    "longer": False,
    "longer_scaled": False,
    "wider": True,
    "per_task": False,
    "finetuned": False,
    "random_groups": False,
    "gradient_clusters": False,
    "average": True,
    "task_arithmetic": True,
    "ties": True,
    "tsv": True,
    "knots": True,
    "lorahub": True,
    "arrow": True,
    "seeds": False,
}
BASELINES = tuple(_NEEDS_LORA)


def chosen_baselines(asked: str | Sequence[str], model: PeftModel, tasks: TaskSet) -> tuple[list[str], dict[str, str]]:
    """The systems to compare with, and those of `"all"` that cannot be made, with the reason.

    Raises:
        `ConfigurationError`: for unknown names, and for systems asked for by name that cannot be made.
    """
    names = [asked] if isinstance(asked, str) else list(asked)
    wants_all = names == ["all"]
    unknown = sorted(set(names) - set(BASELINES)) if not wants_all else []
    if unknown or not names:
        raise ConfigurationError(
            f"Expected baselines to be 'all' or some of {list(BASELINES)}, found {unknown or names}."
        )
    config = model.peft_config[model.active_adapters[0]]
    obstacles = {name: obstacle(name, config, len(tasks)) for name in BASELINES}
    left_out = {name: why for name, why in obstacles.items() if why and (wants_all or name in names)}
    if left_out and not wants_all:
        named = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise ConfigurationError(f"These baselines cannot be made: {named} Leave them out.")
    return [name for name in BASELINES if name not in left_out and (wants_all or name in names)], left_out


def obstacle(name: str, config: object, num_tasks: int) -> str | None:
    """Why a system cannot be made with adapters of this kind; `None` if it can."""
    if _NEEDS_LORA[name] and not _is_plain_lora(config):
        return "It needs plain LoRA adapters of linear layers, without DoRA, biases and saved modules."
    if name in ("random_groups", "gradient_clusters") and num_tasks < 3:
        return "Groups of two tasks are one adapter for all or one per task."
    return None


def _is_plain_lora(config: object) -> bool:
    others = ("use_dora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices")
    return isinstance(config, LoraConfig) and not any(getattr(config, name, None) for name in others)
