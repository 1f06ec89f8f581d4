"""Tiny models, tokenizers and tasks, all made in memory."""

import random
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

NUMBERS = [str(i) for i in range(20)]
WORDS = ["good", "bad", "fine", "awful", "great", "poor", "film", "book", "song", "the", "a", "was", "is", "very"]
VOCABULARY = ["<pad>", "<unk>", "<eos>", *NUMBERS, "+", "-", "=", ":", "sum", "diff", "yes", "no", *WORDS]


def tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    """One token per word."""
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        padding_side=padding_side,
        model_max_length=64,
    )


def llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).eval()


def bert(num_labels: int = 4, seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=num_labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    return BertForSequenceClassification(config).eval()


def other_head(name: str, seed: int = 0):
    """A BERT of another class, such as `"BertForTokenClassification"`."""
    torch.manual_seed(seed)
    return getattr(transformers, name)(bert(3).config).eval()


def tagged_tasks(train: int = 12, validation: int = 6) -> dict[str, dict[str, list[dict]]]:
    """Small tasks of tokens with one of three labels each."""
    tokens = tokenizer()

    def tagged(rows):
        ids = [tokens(row["text"])["input_ids"] for row in rows]
        return [{"input_ids": own, "attention_mask": [1] * len(own), "labels": [i % 3 for i in own]} for own in ids]

    tasks = text_tasks(train, validation)
    return {name: {split: tagged(rows) for split, rows in splits.items()} for name, splits in tasks.items()}


def lora(task_type: str | None = "CAUSAL_LM", **settings) -> LoraConfig:
    targets = "all-linear" if task_type == "CAUSAL_LM" else ["query", "key", "value"]
    return LoraConfig(**{"task_type": task_type, "r": 4, "lora_alpha": 8, "target_modules": targets, **settings})


def with_lora(model, seed: int = 0, **settings) -> PeftModel:
    """A model with an adapter away from its start, where A has a gradient too."""
    torch.manual_seed(seed)
    task_type = "CAUSAL_LM" if isinstance(model, LlamaForCausalLM) else "SEQ_CLS"
    peft_model = get_peft_model(model, lora(task_type, **settings))
    randomize(peft_model)
    return peft_model


def randomize(model, scale: float = 0.2) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=scale)


def save_model(model, folder: Path, padding_side: str = "right") -> str:
    model.save_pretrained(folder)
    tokenizer(padding_side).save_pretrained(folder)
    return str(folder)


def sum_rows(count: int, seed: int = 0, word: str = "sum") -> list[dict]:
    """Prompts and completions of one or two tokens."""
    rng = random.Random(f"{word}{seed}")
    rows = []
    for _ in range(count):
        a, b = rng.randrange(8), rng.randrange(8)
        answer = a + b if word == "sum" else abs(a - b)
        rows.append({"prompt": f"{word} : {a} + {b} =", "completion": f" {answer}" if a % 2 else f" {answer} yes"})
    return rows


def text_rows(
    count: int, seed: int = 0, noun: str = "film", labels: tuple[str, ...] = ("negative", "positive")
) -> list:
    rng = random.Random(f"{noun}{seed}")
    rows = []
    for i in range(count):
        label = i % len(labels)
        word = rng.choice(["bad", "awful", "poor"] if label == 0 else ["good", "great", "fine"])
        rows.append({"text": f"the {noun} {i % 20} was {'very ' * (i % 3)}{word}", "label": label})
        rows[-1]["label_text"] = labels[label]
    return rows


def sft_tasks(train: int = 12, validation: int = 6) -> dict[str, dict[str, list[dict]]]:
    """Three small tasks of prompts and completions."""
    return {
        name: {"train": sum_rows(train, 1, word), "validation": sum_rows(validation, 2, word)}
        for name, word in (("sums", "sum"), ("diffs", "diff"), ("more_sums", "sum"))
    }


def text_tasks(train: int = 12, validation: int = 6) -> dict[str, dict[str, list[dict]]]:
    """Three small classification tasks, two of which share their labels."""
    return {
        "films": {"train": text_rows(train, 1, "film"), "validation": text_rows(validation, 2, "film")},
        "books": {"train": text_rows(train, 3, "book"), "validation": text_rows(validation, 4, "book")},
        "songs": {
            "train": text_rows(train, 5, "song", ("no", "yes")),
            "validation": text_rows(validation, 6, "song", ("no", "yes")),
        },
    }
