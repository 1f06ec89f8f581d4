"""From flags to a trainer."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft import LoraConfig
from transformers import TrainingArguments
from trl import ModelConfig, get_quantization_config

from ..errors import ConfigurationError
from ..evaluate import AnswerMetrics
from ..tasks import RowFormat, TaskSet
from ..train import (
    EnsembleConfig,
    EnsembleSFTConfig,
    EnsembleSFTTrainer,
    EnsembleTrainer,
    SelectionConfig,
    SelectionSFTConfig,
    SelectionSFTTrainer,
    SelectionTrainer,
)
from ..train.inputs.datasets import with_held_out_rows
from ..train.inputs.supported import names_encoder_decoder
from .arguments import DataArguments, answer_metrics, dtype_named, needed
from .data import tasks_of
from .parsing import parse
from .words import Words

Trainers = EnsembleTrainer | EnsembleSFTTrainer | SelectionTrainer | SelectionSFTTrainer


@dataclass
class Started:
    """What a command over a model and data has made of its flags.

    Args:
        arguments (`FlowArguments`): the command's own.
        trainer (`Trainers`): the trainer.
    """

    arguments: Any
    trainer: Trainers


def started(
    kind: type[DataArguments],
    argv: Sequence[str],
    command: str,
    check: Callable[[Any, TrainingArguments], None] | None = None,
) -> Started:
    """The trainer that the flags of a command ask for.

    Args:
        kind (`type[DataArguments]`): the command's own arguments.
        argv (`Sequence[str]`): the flags.
        command (`str`): the command, for errors.
        check (`Callable`, *optional*): takes the command's arguments and the trainer's before the model is loaded.

    Raises:
        `ConfigurationError`: when data, model or output folder is not given, and for a run without adapters.
        `TaskError`: for data that cannot be found or read.
    """
    (arguments, model_arguments), remaining = parse([kind, ModelConfig], argv, True, command)
    if all(getattr(arguments, name) is None for name in ("data", "datasets", "dataset_mixture")):
        needed(command, data=None, model_name_or_path=model_arguments.model_name_or_path)
    needed(command, model_name_or_path=model_arguments.model_name_or_path)
    given = Words.of(argv)
    if given.name("use_peft") and not model_arguments.use_peft:
        raise ConfigurationError(
            "use_peft=False would train the whole model, and every dataset or group gets an adapter here. Leave it out."
        )
    if not given.name("lora_task_type"):
        # trl's default is that of language models, whatever the rows are.
        model_arguments.lora_task_type = None
    tasks = tasks_of(arguments)
    if len(tasks) < 2:
        raise ConfigurationError(
            f"Expected at least two datasets, found {list(tasks)}. Name more in --data; trl sft fine-tunes on one."
        )
    target = getattr(arguments, "target", None)
    metrics = answer_metrics(getattr(arguments, "answer_metrics", None))
    trainer = build_trainer(
        model_arguments,
        tasks,
        remaining,
        target,
        metrics,
        command,
        arguments.max_validation_rows,
        None if check is None else partial(check, arguments),
    )
    return Started(arguments, trainer)


def build_trainer(
    model_arguments: ModelConfig,
    tasks: TaskSet,
    words: Words,
    target: str | None = None,
    answer_metrics: AnswerMetrics = None,
    command: str = "run",
    max_held_out: int | None = None,
    check: Callable[[TrainingArguments], None] | None = None,
) -> Trainers:
    """The trainer for these tasks and this model: ensemble or selection, over trl's trainer or transformers'.

    Args:
        model_arguments (`ModelConfig`): the base model and its adapters.
        tasks (`TaskSet`): the tasks; where they have no evaluation rows, some are held out.
        words (`Words`): arguments of the trainer.
        target (`str`, *optional*): task to select others for.
        answer_metrics (`str` or `dict`, *optional*): see [`EnsembleTrainer`].
        command (`str`, *optional*, defaults to `"run"`): the command, for errors.
        max_held_out (`int`, *optional*): maximum number of rows that are held out of a task.
        check (`Callable`, *optional*): takes the trainer's arguments before anything is loaded.

    Raises:
        `HfEnsembleError`: for arguments that the trainer does not take.
    """
    name = model_arguments.model_name_or_path
    task_type = None if tasks.row_format is RowFormat.CLASSIFICATION else "CAUSAL_LM"
    if task_type is not None and names_encoder_decoder(name):
        task_type = "SEQ_2_SEQ_LM"
    if model_arguments.lora_task_type not in (None, task_type or "SEQ_CLS"):
        raise ConfigurationError(
            f"Found lora_task_type={model_arguments.lora_task_type!r}; the rows and the model make it "
            f"{task_type or 'SEQ_CLS'!r}. Leave it out."
        )
    # trl fine-tunes models of decoder layers alone.
    is_plain = task_type != "CAUSAL_LM"
    classes = {
        (True, False): (EnsembleTrainer, EnsembleConfig),
        (False, False): (EnsembleSFTTrainer, EnsembleSFTConfig),
        (True, True): (SelectionTrainer, SelectionConfig),
        (False, True): (SelectionSFTTrainer, SelectionSFTConfig),
    }
    trainer_class, config_class = classes[is_plain, target is not None]
    (args,), _ = parse([config_class], words, command=command)
    if not words.name("output_dir"):
        # The parents have a default, which another run may have taken.
        needed(command, output_dir=None)
    if check is not None:
        check(args)
    if max_held_out is not None:
        tasks = with_held_out_rows(tasks, args.validation_fraction, args.seed, max_held_out)
    args.model_init_kwargs = {**_loading_arguments(model_arguments, args), **(args.model_init_kwargs or {})}
    options: dict[str, Any] = {"answer_metrics": answer_metrics} | ({} if target is None else {"target": target})
    quantization = get_quantization_config(model_arguments)
    if not is_plain:
        options["quantization_config"] = quantization
    elif quantization is not None:
        raise ConfigurationError(
            "A base is quantized for models of decoder layers alone, found text with labels or an encoder-decoder. "
            "Leave --load_in_4bit and --load_in_8bit out."
        )
    peft_config = LoraConfig(
        task_type=task_type,
        r=model_arguments.lora_r,
        lora_alpha=model_arguments.lora_alpha,
        lora_dropout=model_arguments.lora_dropout,
        target_modules=_modules(model_arguments.lora_target_modules),
        target_parameters=model_arguments.lora_target_parameters,
        use_rslora=model_arguments.use_rslora,
        use_dora=model_arguments.use_dora,
        modules_to_save=model_arguments.lora_modules_to_save,
    )
    return trainer_class(
        model=name,
        args=args,
        train_dataset=tasks,
        peft_config=peft_config,
        **options,
    )


def _modules(named: str | list[str] | None) -> str | list[str] | None:
    """Layers by name; trl makes a text of a single one, which PEFT would take for a pattern of the whole path."""
    return [named] if isinstance(named, str) and named != "all-linear" and re.fullmatch(r"[\w.]+", named) else named


def _loading_arguments(model_arguments: ModelConfig, args: TrainingArguments) -> dict[str, Any]:
    """Arguments of `from_pretrained`, as trl's own scripts pass them."""
    # A field of trl's ModelConfig or of its SFTConfig, depending on the version.
    trusted = any(getattr(own, "trust_remote_code", False) for own in (model_arguments, args))
    return {
        "revision": model_arguments.model_revision,
        "trust_remote_code": trusted,
        "attn_implementation": model_arguments.attn_implementation,
        "dtype": dtype_named(model_arguments.dtype),
    }
