"""Models that need no download: randomly initialized or trained from scratch."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
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


def llama_on_device(config: LlamaConfig, device: torch.device, quantization: str | None = None) -> LlamaForCausalLM:
    """A Llama with random frozen weights in bfloat16, which are made on the device, one layer after the other.

    Args:
        config (`LlamaConfig`): its shape.
        device (`torch.device`): where it runs.
        quantization (`str`, *optional*): `"nf4"` for 4-bit weights in all linear layers but the head.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    if quantization is not None:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                model.set_submodule(name, _quantized_linear(module, device, config.initializer_range))
        model.is_loaded_in_4bit = True
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                value = value.fill_(1.0) if parameter.dim() == 1 else value.normal_(std=config.initializer_range)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    # Its frequencies are a buffer, which is on the meta device as well.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    return model.requires_grad_(False).eval()


def _quantized_linear(module: nn.Linear, device: torch.device, std: float) -> nn.Module:
    import bitsandbytes as bnb

    weight = torch.empty(module.weight.shape, dtype=torch.bfloat16, device=device).normal_(std=std)
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
    # Moving it quantizes it, also to the device where it is.
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer).to(device)
    return layer


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
