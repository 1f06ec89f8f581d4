"""Arguments of another class than a trainer's own: of its parent's, of a class of the user's, of another trainer's."""

from contextlib import nullcontext
from dataclasses import fields
from typing import TypeVar

from transformers import Seq2SeqTrainingArguments, TrainingArguments
from trl import SFTConfig

from ..._settings import taken_by_parent
from ...errors import ConfigurationError
from ..configs import EnsembleArguments, EnsembleConfig, EnsembleSFTConfig, SelectionConfig, SelectionSFTConfig

Config = TypeVar("Config", bound=TrainingArguments)

_LIBRARIES = ("transformers", "trl", "hf_ensemble")
_TRAINERS: dict[str, type[TrainingArguments]] = {
    "EnsembleTrainer": EnsembleConfig,
    "EnsembleSFTTrainer": EnsembleSFTConfig,
    "SelectionTrainer": SelectionConfig,
    "SelectionSFTTrainer": SelectionSFTConfig,
}


def as_config(args: TrainingArguments, config_class: type[Config], trainer: str, is_parent: bool = False) -> Config:
    """Arguments as those of a trainer's own class, field by field; its own class is passed through.

    What only a class of the user's has is kept beside them.

    Args:
        args (`TrainingArguments`): the arguments.
        config_class (`type`): the trainer's own class.
        trainer (`str`): name of the trainer, for errors.
        is_parent (`bool`, *optional*, defaults to `False`):
            Whether the trainer does what its parent does, which takes arguments of any class, and has taken their
            values.

    Raises:
        `ConfigurationError`: for an argument of another trainer that is set, unless the trainer is its parent.
    """
    if isinstance(args, config_class):
        return args
    library = next(own for own in type(args).__mro__ if own.__module__.partition(".")[0] in _LIBRARIES)
    lacking = set() if is_parent else _names(library) - _names(config_class)
    if lacking:
        _check_unset(args, library, lacking, config_class, trainer)
    with taken_by_parent() if is_parent else nullcontext():
        config = config_class(**_shared(args, type(args), config_class))
    kept = {name: value for name, value in vars(args).items() if name not in vars(config) and name not in lacking}
    vars(config).update(kept)
    config.kept_fields = tuple(sorted(_names(type(args)) & set(kept)))
    return config


def _check_unset(
    args: TrainingArguments,
    library: type[TrainingArguments],
    lacking: set[str],
    config_class: type[TrainingArguments],
    trainer: str,
) -> None:
    """Refuse arguments that the trainer does not have, where they are not what they are by default."""
    unset = library(**_shared(args, library, config_class))
    declared = {own.name: own.default for own in fields(library)}
    # What is as declared may have been resolved by what is set.
    found = {name: getattr(args, name) for name in sorted(lacking)}
    found = {name: value for name, value in found.items() if value not in (getattr(unset, name), declared[name])}
    if found:
        named = ", ".join(f"{name}={value!r}" for name, value in found.items())
        raise ConfigurationError(
            f"Expected arguments that {trainer} can honour, found {named} of {library.__name__}. "
            f"{_advice(next(iter(found)), library, config_class)}"
        )


def _advice(name: str, library: type[TrainingArguments], config_class: type[TrainingArguments]) -> str:
    def distance(own: type[TrainingArguments]) -> int:
        return sum(issubclass(own, kind) != issubclass(config_class, kind) for kind in (EnsembleArguments, SFTConfig))

    able = {trainer: distance(own) for trainer, own in _TRAINERS.items() if name in _names(own)}
    if able:
        return f"Leave that out, or use {min(able, key=able.get)}."
    if issubclass(library, Seq2SeqTrainingArguments):
        return "Leave that out; answer_metrics=AnswerMetric(...) scores generated answers."
    return "Leave that out."


def _names(config_class: type[TrainingArguments]) -> set[str]:
    return {own.name for own in fields(config_class) if own.init}


def _shared(
    args: TrainingArguments, args_class: type[TrainingArguments], config_class: type[TrainingArguments]
) -> dict:
    return {name: getattr(args, name) for name in _names(args_class) & _names(config_class)}
