"""`hf-ensemble run`: a folder of tasks and a model path, to a saved and documented ensemble."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoTokenizer
from trl import ModelConfig, get_quantization_config

from .._compat import package_versions
from .._files import read_json, write_folder_atomically, write_json
from ..ensemble import LabelSimilarityForSequenceClassification
from ..errors import ConfigurationError
from ..estimate import SubsetEstimator
from ..store import GradientStore
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
    measure_fidelity,
)
from ..train.multi_task_trainer import load_classifier
from .arguments import RunArguments, parse, with_config
from .report import console, fidelity_table, grouping_table, results_table, selection_table


def run(argv: Sequence[str]) -> dict[str, Any]:
    """Run the whole flow; returns what `results.json` holds.

    Raises:
        `HfEnsembleError`: for bad arguments, tasks or models.
    """
    if {"-h", "--help"} & set(argv):
        # The trainer's arguments are known once the data are; those of the ensemble trainers are the fullest.
        parse([RunArguments, ModelConfig, EnsembleSFTConfig], ["--help"])
    (arguments, model_arguments), remaining = parse([RunArguments, ModelConfig], with_config(argv), True)
    if arguments.data is None or model_arguments.model_name_or_path is None:
        raise ConfigurationError("Expected --data FOLDER and --model_name_or_path MODEL; see hf-ensemble run --help.")
    limits = {"train": arguments.max_train_rows, "validation": arguments.max_validation_rows}
    tasks = load_task_folder(
        arguments.data,
        validation_fraction=arguments.validation_fraction,
        max_rows={split: limit for split, limit in limits.items() if limit is not None},
        names=arguments.tasks,
    )
    trainer = build_trainer(arguments, model_arguments, tasks, remaining)
    trainer.train()
    results = collect_results(trainer, tasks, arguments)
    write_json(Path(trainer.args.output_dir) / "results.json", results)
    report(trainer, results)
    return results


def build_trainer(arguments: RunArguments, model_arguments: ModelConfig, tasks: TaskSet, flags: Sequence[str]):
    """The trainer for these tasks: over text classification or supervised fine-tuning, ensemble or selection."""
    is_classification = tasks.row_format is RowFormat.CLASSIFICATION
    classes = {
        (True, False): (EnsembleTrainer, EnsembleConfig),
        (False, False): (EnsembleSFTTrainer, EnsembleSFTConfig),
        (True, True): (SelectionTrainer, SelectionConfig),
        (False, True): (SelectionSFTTrainer, SelectionSFTConfig),
    }
    trainer_class, config_class = classes[is_classification, arguments.target is not None]
    (args,), _ = parse([config_class], flags)
    if args.output_dir is None:
        raise ConfigurationError("Expected --output_dir FOLDER.")
    name = model_arguments.model_name_or_path
    loading = _loading_arguments(model_arguments)
    remote = {key: loading[key] for key in ("revision", "trust_remote_code")}
    tokenizer = AutoTokenizer.from_pretrained(name, **remote)
    model: Any = name
    task_type: str | None = "CAUSAL_LM"
    options: dict[str, Any] = {} if arguments.target is None else {"target": arguments.target}
    quantization = get_quantization_config(model_arguments)
    if not is_classification:
        args.model_init_kwargs = {**loading, **(args.model_init_kwargs or {})}
        options["quantization_config"] = quantization
    elif quantization is not None:
        raise ConfigurationError("Text classification over a quantized base is not supported: leave load_in_... away.")
    elif _wants_label_similarity(arguments.head, name, remote):
        # Nothing of this model but its buffers is its own, so no head has to be saved with the adapters.
        task_type = None
        model = label_similarity_model(name, tokenizer, tasks, Path(args.output_dir) / "base", **loading)
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
            write_json(target / "made_of.json", {"encoder": name, "labels": list(names)})

        write_folder_atomically(folder, write)
    return LabelSimilarityForSequenceClassification.from_pretrained(folder)


def _is_label_similarity_of(folder: Path, encoder: str, labels: Sequence[str]) -> bool:
    made_of = folder / "made_of.json"
    return made_of.is_file() and read_json(made_of) == {"encoder": encoder, "labels": list(labels)}


def collect_results(trainer, tasks: TaskSet, arguments: RunArguments) -> dict[str, Any]:
    """Scores of every system on test rows (evaluation rows where a task has none), groups and fidelity."""
    split = "test" if tasks.has_split("test") else "eval"
    raw = tasks.split("test") if split == "test" else None
    if split == "test":
        trainer.evaluate(raw, metric_key_prefix="test")
    scores = read_json(Path(trainer.args.output_dir) / "evaluation.json")[split]
    datasets = trainer.eval_dataset if raw is None else trainer.prepare_rows(raw)
    scores = {"base": trainer.score_adapter(None, datasets, "Evaluating base"), **scores}
    results: dict[str, Any] = {
        "split": split,
        "scores": scores,
        "mean_accuracy": {
            system: sum(score["accuracy"] for score in by_task.values()) / len(by_task)
            for system, by_task in scores.items()
        },
        "configuration": trainer.run_directory.record["configuration"],
        "versions": package_versions(),
        "stage_seconds": {name: stage["seconds"] for name, stage in trainer.run_directory.record["stages"].items()},
    }
    if arguments.target is None:
        results["groups"] = trainer.grouping.groups
        results["weights"] = trainer.ensemble.weights
    else:
        results["selection"] = {
            "target": trainer.target,
            "tasks": trainer.selection.tasks,
            "why": trainer.selection.why,
        }
    if arguments.fidelity_subsets:
        trainer.fidelity = measure_fidelity(
            trainer,
            estimator_of(trainer),
            arguments.fidelity_subsets,
            arguments.fidelity_subset_size,
            seed=trainer.args.seed,
        )
        results["fidelity"] = read_json(Path(trainer.args.output_dir) / "estimate" / "fidelity.json")
    return results


def estimator_of(trainer) -> SubsetEstimator:
    """The estimator that the run's choices were made with."""
    return trainer.selector(GradientStore(Path(trainer.args.output_dir) / "gradients")).estimator


def report(trainer, results: dict[str, Any]) -> None:
    """The tables at the end."""
    out = console()
    folder = Path(trainer.args.output_dir)
    if "groups" in results:
        out.print(grouping_table(trainer.grouping, trainer.ensemble))
    else:
        out.print(selection_table(trainer.selection))
    out.print(results_table(results["scores"], results["split"]))
    if "fidelity" in results:
        out.print(fidelity_table(trainer.fidelity))
    saved = folder / ("ensemble" if "groups" in results else "adapter")
    out.print(f"Saved: {saved}\nResults: {folder / 'results.json'}", soft_wrap=True)
    if "groups" in results:
        out.print(f"Model card: {folder / 'ensemble' / 'README.md'}", soft_wrap=True)
