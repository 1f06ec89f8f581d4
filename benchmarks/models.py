"""Models that need no download: randomly initialized or trained from scratch."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from .skills import tokenizer


def randomize_lora_b(model: PeftModel) -> PeftModel:
    """Randomize every LoRA B, which starts at zero, so that adapters differ and A has a gradient."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


def train_from_scratch(model: PreTrainedModel, rows: Dataset, folder: str | Path, **options: Any) -> None:
    """Train on rows of `input_ids` and `labels` on the CPU, with a cosine schedule and a short warm-up.

    Args:
        model (`PreTrainedModel`): trained in place.
        rows (`Dataset`): rows of equal length.
        folder (`str` or `Path`): the trainer's output directory; nothing is saved.
        options: more `TrainingArguments`.
    """
    args = TrainingArguments(
        output_dir=str(folder),
        warmup_steps=100,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        **options,
    )
    Trainer(model, args, train_dataset=rows, data_collator=default_data_collator).train()


def write_tiny_llama(folder: Path) -> None:
    """A Llama with random weights and the tokenizer of the skills, of which it takes rows."""
    tokens = tokenizer()
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokens.pad_token_id,
        bos_token_id=tokens.eos_token_id,
        eos_token_id=tokens.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
