"""From flags to a trainer over a folder of tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoTokenizer
from trl import ModelConfig, get_quantization_config

from .._files import checksums, read_json, write_folder_atomically, write_json
from ..errors import ConfigurationError, RecordError
from ..evaluate import AnswerMetrics
from ..models import LabelSimilarityForSequenceClassification
from ..runs import RunDirectory
from ..tasks import RowFormat, TaskSet, load_task_folder
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
from ..train.inputs.datasets import load_classifier
from .arguments import DataArguments, parse

# What a model with the labels as its head was made of, beside its files.
_MADE_OF = "made_of.json"

Trainers = EnsembleTrainer | EnsembleSFTTrainer | SelectionTrainer | SelectionSFTTrainer


def load_tasks(arguments: DataArguments, model_arguments: ModelConfig, command: str) -> TaskSet:
    """The tasks that the flags name.

    Raises:
        `ConfigurationError`: when the folder of tasks or the model is not given.
        `TaskError`: for a folder without tasks.
    """
    if arguments.data is None or model_arguments.model_name_or_path is None:
        raise ConfigurationError(
            f"Expected --data FOLDER and --model_name_or_path MODEL; see hf-ensemble {command} --help."
        )
    limits = {"train": arguments.max_train_rows, "validation": arguments.max_validation_rows}
    return load_task_folder(
        arguments.data,
        max_rows={split: limit for split, limit in limits.items() if limit is not None},
        names=arguments.tasks,
    )


def build_trainer(
    arguments: DataArguments,
    model_arguments: ModelConfig,
    tasks: TaskSet,
    flags: Sequence[str],
    target: str | None = None,
    answer_metrics: AnswerMetrics = None,
) -> Trainers:
    """The trainer for these tasks: over text classification or supervised fine-tuning, ensemble or selection."""
    is_classification = tasks.row_format is RowFormat.CLASSIFICATION
    classes = {
        (True, False): (EnsembleTrainer, EnsembleConfig),
        (False, False): (EnsembleSFTTrainer, EnsembleSFTConfig),
        (True, True): (SelectionTrainer, SelectionConfig),
        (False, True): (SelectionSFTTrainer, SelectionSFTConfig),
    }
    trainer_class, config_class = classes[is_classification, target is not None]
    (args,), _ = parse([config_class], flags)
    if args.output_dir is None:
        raise ConfigurationError("Expected --output_dir FOLDER.")
    name = model_arguments.model_name_or_path
    loading = _loading_arguments(model_arguments)
    remote = {key: loading[key] for key in ("revision", "trust_remote_code")}
    tokenizer = AutoTokenizer.from_pretrained(name, **remote)
    model: Any = name
    task_type: str | None = "CAUSAL_LM"
    options: dict[str, Any] = {} if target is None else {"target": target}
    options["answer_metrics"] = answer_metrics
    quantization = get_quantization_config(model_arguments)
    if not is_classification:
        args.model_init_kwargs = {**loading, **(args.model_init_kwargs or {})}
        options["quantization_config"] = quantization
    elif quantization is not None:
        raise ConfigurationError(
            "Text classification over a quantized base is not supported: do not set load_in_4bit or load_in_8bit."
        )
    elif _wants_label_similarity(arguments.head, name, remote):
        # Nothing of this model but its buffers is its own, so no head has to be saved with the adapters.
        task_type = None
        model = label_similarity_model(name, tokenizer, tasks, RunDirectory(args.output_dir).base_model, **loading)
    else:
        task_type = "SEQ_CLS"
        model = load_classifier(name, tasks.label_space, **loading)
    peft_config = LoraConfig(
        task_type=task_type,
        r=model_arguments.lora_r,
        lora_alpha=model_arguments.lora_alpha,
        lora_dropout=model_arguments.lora_dropout,
        target_modules=model_arguments.lora_target_modules,
        use_rslora=model_arguments.use_rslora,
        use_dora=model_arguments.use_dora,
        modules_to_save=model_arguments.lora_modules_to_save,
    )
    return trainer_class(
        model=model,
        args=args,
        train_dataset=tasks,
        processing_class=tokenizer,
        peft_config=peft_config,
        **options,
    )


def _loading_arguments(model_arguments: ModelConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained`, as trl's own scripts pass them."""
    dtype = model_arguments.dtype
    if dtype not in ("auto", None) and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigurationError(f"dtype has to be 'auto' or a type of torch such as 'bfloat16', found {dtype!r}.")
    return {
        "revision": model_arguments.model_revision,
        "trust_remote_code": getattr(model_arguments, "trust_remote_code", False),
        "attn_implementation": model_arguments.attn_implementation,
        "dtype": dtype if dtype in ("auto", None) else getattr(torch, dtype),
    }


def _wants_label_similarity(head: str, name: str, remote: dict[str, Any]) -> bool:
    if head != "auto":
        return head == "label_similarity"
    architectures = AutoConfig.from_pretrained(name, **remote).architectures or []
    has_head = any(architecture.endswith("ForSequenceClassification") for architecture in architectures)
    return not has_head


def label_similarity_model(name: str, tokenizer, tasks: TaskSet, folder: Path, **model_kwargs: Any):
    """The encoder with the tasks' labels as its head, saved as a base model of its own that the ensemble can name."""
    names = tasks.label_space.names
    if not _is_label_similarity_of(folder, name, names):
        model = LabelSimilarityForSequenceClassification.from_encoder(name, tokenizer, names, **model_kwargs)

        def write(target: Path) -> None:
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
            write_json(target / _MADE_OF, {"encoder": name, "labels": list(names), "files": checksums(target)})

        write_folder_atomically(folder, write)
    return LabelSimilarityForSequenceClassification.from_pretrained(folder)


def _is_label_similarity_of(folder: Path, encoder: str, labels: Sequence[str]) -> bool:
    """Whether the model was made of these, and its files are as they were written."""
    try:
        made_of = read_json(folder / _MADE_OF)
    except (OSError, RecordError):
        return False
    files = {name: checksum for name, checksum in checksums(folder).items() if name != _MADE_OF}
    return made_of == {"encoder": encoder, "labels": list(labels), "files": files}
