"""The members of an ensemble, their base model and their weights."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from numbers import Real

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper

from .._settings import checked_mapping
from ..errors import EnsembleError, EnsembleLoadError
from ..models import LabelHead
from .adapter_kinds import adapter_obstacle

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class BaseModelReference:
    """Where an ensemble's base model comes from.

    Args:
        name_or_path (`str`): Hub id or folder.
        revision (`str`, *optional*): commit on the Hub.
        auto_class (`str`): the transformers auto class that loads it.
        num_labels (`int`, *optional*): number of outputs of a classification head that the checkpoint lacks.
        pad_token_id (`int`, *optional*): padding token of a classifier, which its checkpoint may lack.
        label_head (`LabelHead`, *optional*): the labels' texts, where they are the head of an encoder without one.
        labels (`list[str]`, *optional*): what a classifier's outputs are called, where they have names.
        problem_type (`str`, *optional*): a classifier's, which its loss depends on.
    """

    name_or_path: str
    revision: str | None
    auto_class: str
    num_labels: int | None = None
    pad_token_id: int | None = None
    label_head: LabelHead | None = None
    labels: list[str] | None = None
    problem_type: str | None = None


@dataclass(frozen=True)
class EnsembleMember:
    """One adapter.

    Args:
        name (`str`): its name, which is also its folder under `adapters/`.
        tasks (`list[str]`): the tasks it was trained on.
        is_step (`bool`): whether its logits make sense only beside others', as those of a boosting step, or of the
            adapter at its start, which are taken off them. Default weights and routing by prompts leave it out.
    """

    name: str
    tasks: list[str] = field(default_factory=list)
    is_step: bool = False


def standing_alone(members: Sequence[EnsembleMember]) -> list[int]:
    """Numbers of the members whose logits make sense without others': all but boosting steps."""
    return [number for number, member in enumerate(members) if not member.is_step]


def check_adapter_name(name: str) -> None:
    """Raise [`EnsembleLoadError`] for a name that is not a plain folder name and might lead out of the folder."""
    if not isinstance(name, str) or not _ADAPTER_NAME.fullmatch(name):
        raise EnsembleLoadError(f"Adapter name {name!r} is not a valid folder name: use letters, digits, '_' and '-'.")


def check_members(model: PeftModel, names: list[str]) -> None:
    """Raise [`EnsembleError`] unless these are distinct adapters of the model that can share it."""
    if not isinstance(model, PeftModel):
        raise EnsembleError(f"Expected model to be a PeftModel with the adapters, found a {type(model).__name__}.")
    for name in names:
        check_adapter_name(name)
    lacking = sorted(set(names) - set(model.peft_config))
    if lacking or not names or len(set(names)) < len(names):
        raise EnsembleError(
            f"Expected different adapters of the model as members, found {names}; the model has "
            f"{list(model.peft_config)}."
        )
    for name in names:
        obstacle = adapter_obstacle(model.peft_config[name].to_dict())
        if obstacle is not None:
            raise EnsembleError(f"The configuration of the adapter {name!r} {obstacle}.")
    _check_saved_modules(model, names)


def _check_saved_modules(model: PeftModel, names: list[str]) -> None:
    """Raise where an adapter has layers within a module that another one has saved, which is no part of the base."""
    for path, module in model.get_base_model().named_modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        for owner, saved in module.modules_to_save.items():
            layers = (own for own in saved.modules() if isinstance(own, BaseTunerLayer))
            inside = sorted({name for own in layers for name in own._get_available_adapters()} & set(names))
            if owner in names and inside:
                raise EnsembleError(
                    f"The adapters {inside} have layers in {path!r} of the adapter {owner!r}, whose modules_to_save "
                    f"holds it. Name {path!r} in the exclude_modules of {inside}, or load them before {owner!r}."
                )


def check_weights(weights: Mapping[str, Mapping[str, float]], members: list[str], where: str = "") -> None:
    """Raise [`EnsembleError`] for a weight of an unknown adapter, one that is not finite, or a task without any."""
    prefix = f"{where}: the" if where else "The"
    for task, row in checked_mapping("the weights by task", weights, EnsembleError).items():
        checked_mapping(f"the weights of {task!r}", row, EnsembleError)
        unknown = sorted(set(row) - set(members))
        if unknown:
            raise EnsembleError(
                f"{prefix} weights of {task!r} name unknown adapters {unknown}; the adapters are {members}."
            )
        numbers = all(isinstance(w, Real) and not isinstance(w, bool) and isfinite(w) for w in row.values())
        if not numbers or not any(row.values()):
            raise EnsembleError(
                f"{prefix} weights of {task!r} must be finite numbers and not all zero, found {dict(row)}."
            )


def check_scales(scales: Mapping[str, float], where: str = "") -> None:
    """Raise [`EnsembleError`] for a task's scale that is not a finite number above 0."""
    prefix = f"{where}: expected" if where else "Expected"
    for task, scale in checked_mapping("the scales by task", scales, EnsembleError).items():
        if not isinstance(scale, Real) or isinstance(scale, bool) or not isfinite(scale) or scale <= 0:
            raise EnsembleError(f"{prefix} the scale of {task!r} to be a finite number above 0, found {scale!r}.")


def plain_numbers(values: Mapping[str, Real]) -> dict[str, float]:
    """Weights or scales as floats: other numbers, such as NumPy's, could not be saved."""
    return {name: float(value) for name, value in values.items()}


def plain_weights(weights: Mapping[str, Mapping[str, Real]]) -> dict[str, dict[str, float]]:
    """Weights by task as floats."""
    return {task: plain_numbers(row) for task, row in weights.items()}
