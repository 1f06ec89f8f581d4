"""The model card of one plain training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import TrainerState, TrainingArguments

from .._cards import CardParts, render
from .._compat import package_versions
from .._values import plain_values
from ..ensemble.members import BaseModelReference
from ..ensemble.saving.auto_classes import auto_class_of
from ..ensemble.saving.card import adapter_loading, adapter_metadata, model_loading, public_name
from ..ensemble.saving.files import base_reference
from ..tasks import TaskSet
from ..tasks.presentation import example_prompt, hub_datasets

# Arguments that say how a model was trained.
_SHOWN = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)
_SHOWN += ("lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm", "bf16", "fp16", "seed")

# Ends of figures that say how fast an evaluation was.
_CLOCKS = ("_runtime", "_per_second", "_preparation_time")


def training_card(
    model: nn.Module,
    args: TrainingArguments,
    state: TrainerState,
    folder: Path,
    repo_id: str | None = None,
    tasks: TaskSet | None = None,
    with_examples: bool = True,
) -> CardParts:
    """What the card of a model that a plain trainer has trained is made of.

    Args:
        model (`nn.Module`): the model, or a `PeftModel`.
        args (`TrainingArguments`): of the training.
        state (`TrainerState`): its steps and logs.
        folder (`Path`): where the model lies.
        repo_id (`str`, *optional*): the repository that the code in the card loads from; the folder by default.
        tasks (`TaskSet`, *optional*): what it was trained on.
        with_examples (`bool`, *optional*, defaults to `True`): whether to show a prompt of the tasks.
    """
    base = base_of(model)
    own = {} if tasks is None or not with_examples else {name: example_prompt(task) for name, task in tasks.items()}
    examples = {name: example for name, example in own.items() if example} or {"": "A prompt"}
    is_adapter = isinstance(model, PeftModel)
    if is_adapter:
        loading = adapter_loading(folder, base, examples, repo_id, model.active_peft_config)
    else:
        loading = model_loading(folder, base, examples, repo_id)
    sources = [] if tasks is None else [name for task in tasks.values() for name in hub_datasets(task.splits.values())]
    metadata = training_metadata(model)
    if sources:
        metadata["datasets"] = list(dict.fromkeys(sources))
    body = render(
        "training_card.md.jinja",
        loading=loading,
        is_adapter=is_adapter,
        rows={name: {split: len(own) for split, own in task.splits.items()} for name, task in (tasks or {}).items()},
        results=results_by_task(state, tasks),
        state=state,
        arguments={name: _shown(getattr(args, name)) for name in _SHOWN},
        versions=package_versions(),
    )
    return CardParts(metadata, body)


def training_metadata(model: nn.Module) -> dict[str, Any]:
    """Metadata of the card: what the model is, and of which base."""
    kind = ("peft", "adapter") if isinstance(model, PeftModel) else ("transformers", "finetune")
    return adapter_metadata(base_of(model), ["hf-ensemble"], *kind)


def base_of(model: nn.Module) -> BaseModelReference:
    """Base model of an adapter, or what a model was loaded from; with no auto class where there is none for it."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    auto_class = auto_class_of(inner)
    if isinstance(model, PeftModel) and auto_class is not None:
        base = base_reference(model)
        # An encoder whose head are the labels' texts has no auto class.
        return base if base.label_head is None else replace(base, auto_class="")
    name = getattr(getattr(inner, "config", None), "_name_or_path", None) or ""
    revision = getattr(getattr(inner, "config", None), "_commit_hash", None)
    return BaseModelReference(name, revision, auto_class or "")


def results_by_task(state: TrainerState, tasks: TaskSet | None) -> dict[str, dict[str, float]]:
    """The latest evaluation's figures by task; of the whole evaluation by `""`."""
    latest: dict[str, float] = {}
    for entry in state.log_history:
        latest |= {
            key: value
            for key, value in entry.items()
            if key.startswith("eval_") and isinstance(value, float) and not key.endswith(_CLOCKS)
        }
    found: dict[str, dict[str, float]] = {}
    names = [] if tasks is None else list(tasks)
    for key, value in latest.items():
        # The longest name: one task's may begin like another's.
        task = max((name for name in names if key.startswith(f"eval_{name}_")), key=len, default=None)
        if task is not None:
            found.setdefault(task, {})[key.removeprefix(f"eval_{task}_")] = value
    if not found and "eval_loss" in latest:
        found[""] = {"loss": latest["eval_loss"]}
    return found


def _shown(value: Any) -> Any:
    value = plain_values(value, other=str)
    return public_name(value) if isinstance(value, str) else value
