"""Train a small Llama and its tokenizer from scratch, on the text of tasks that a study does not use.

    python benchmarks/small_llama.py DATA TARGET --without TASK [TASK ...]

Every `train.jsonl` under DATA (`prompt` and `completion`, or `text` and `label_text`) is text to learn, those of the
named tasks aside.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

PARTS, LABELLED = ("prompt", "completion"), ("text", "label_text")
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def texts(folder: Path, without: set[str]) -> list[str]:
    """Each row as one string in the form of the instruction tasks: a text, `Output:`, and right behind it the answer.

    A model that has seen many kinds of answers there is not taken aback by those of a new task.
    """
    rows = []
    for file in sorted(folder.rglob("train.jsonl")):
        if file.parent.name not in without:
            for line in file.read_text().splitlines():
                row = json.loads(line)
                asked, answer = (row[key] for key in (PARTS if "prompt" in row else LABELLED))
                rows.append(f"{asked.removesuffix('Output:').rstrip()}\nOutput:{answer}")
    return rows


def train_tokenizer(rows: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL.values()), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(rows, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def blocks(rows: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> Dataset:
    """All rows one after another, cut into blocks of equal length."""
    encoded = tokenizer([row + tokenizer.eos_token for row in rows])["input_ids"]
    stream = torch.tensor([token for row in encoded for token in row])
    stream = stream[: len(stream) // length * length].view(-1, length)
    return Dataset.from_dict({"input_ids": stream.tolist(), "labels": stream.tolist()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--without", nargs="+", default=[])
    parser.add_argument("--vocabulary", type=int, default=384)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--epochs", type=float, default=2)
    arguments = parser.parse_args()
    set_seed(0)
    rows = texts(arguments.data, set(arguments.without))
    tokenizer = train_tokenizer(rows, arguments.vocabulary)
    dataset = blocks(rows, tokenizer, arguments.block)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    print(f"{len(rows)} rows, {len(dataset)} blocks, {model.num_parameters():,} parameters", flush=True)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(arguments.target),
            per_device_train_batch_size=16,
            num_train_epochs=arguments.epochs,
            learning_rate=2e-3,
            warmup_steps=100,
            lr_scheduler_type="cosine",
            weight_decay=0.05,
            save_strategy="no",
            report_to="none",
            logging_steps=100,
            use_cpu=True,
            bf16=True,
            seed=0,
        ),
        train_dataset=dataset,
        data_collator=default_data_collator,
    )
    trainer.train()
    model.save_pretrained(arguments.target)
    tokenizer.save_pretrained(arguments.target)


if __name__ == "__main__":
    main()
