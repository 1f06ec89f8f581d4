"""A small Llama that has read generated skills, most of the arithmetic wrong, and trainers of ensembles over it."""

import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from hf_ensemble import AnswerMetric, EnsembleSFTConfig, EnsembleSFTTrainer

from .models import train_from_scratch
from .skills import ARITHMETIC, CORRUPTED, SKILLS, tokenizer, unreliable

METRIC = AnswerMetric("the_answer_is", "exact_match", max_new_tokens=24)


def pretrained(folder: Path, count: int, seed: int = 0) -> Path:
    """The base model, after one epoch on rows of every skill, most of them wrong."""
    if (folder / "config.json").exists():
        return folder
    set_seed(seed)
    generator, tokens = random.Random(seed), tokenizer()
    # Calculation is the hardest to learn: two thirds of what is read.
    names = [name for name in SKILLS if name not in CORRUPTED] + 2 * list(ARITHMETIC)
    read = [unreliable(names[index % len(names)], generator) for index in range(count)]
    encoded = tokens([row["prompt"] + row["completion"] + tokens.eos_token for row in read], padding=True)
    ids, mask = np.array(encoded["input_ids"]), np.array(encoded["attention_mask"])
    data = {"input_ids": ids, "attention_mask": mask, "labels": np.where(mask == 1, ids, -100)}
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokens.pad_token_id,
        bos_token_id=tokens.eos_token_id,
        eos_token_id=tokens.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as scratch:
        train_from_scratch(
            model,
            Dataset.from_dict({name: values.tolist() for name, values in data.items()}),
            scratch,
            per_device_train_batch_size=64,
            num_train_epochs=1,
            learning_rate=2e-3,
            logging_steps=200,
            disable_tqdm=True,
            seed=seed,
        )
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def skills_lora() -> LoraConfig:
    """The adapter of every study on skills."""
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def skills_arguments(folder: Path, seed: int) -> dict[str, Any]:
    """Arguments of every trainer on skills: exact gradients, a CPU, and nothing written but the run."""
    return {
        "output_dir": str(folder),
        "projection_dim": None,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 100,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": seed,
    }


def skills_ensemble(
    base: Path,
    folder: Path,
    seed: int,
    splits: Mapping[str, Mapping[str, Dataset]],
    answer_metrics: AnswerMetric | None = None,
    **options: Any,
) -> EnsembleSFTTrainer:
    """The trainer of an ensemble over skills.

    Args:
        base (`Path`): the model of [`pretrained`].
        folder (`Path`): of the run.
        seed (`int`): of the trainings.
        splits (`dict[str, dict[str, Dataset]]`): rows of each skill by split.
        answer_metrics (`AnswerMetric`, *optional*): of generated answers.
        options: more arguments of `EnsembleSFTConfig`.
    """
    by_task = {name: {split: own[name] for split, own in splits.items()} for name in splits["train"]}
    return EnsembleSFTTrainer(
        model=str(base),
        args=EnsembleSFTConfig(**skills_arguments(folder, seed), **options),
        train_dataset=by_task,
        peft_config=skills_lora(),
        answer_metrics=answer_metrics,
    )
