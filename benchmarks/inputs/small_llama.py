"""Train a small Llama and its tokenizer from scratch on the text of tasks that no study uses.

    python -m benchmarks.inputs.small_llama --data DATA --output_dir LLAMA --without TASK [TASK ...]

The text is that of every `train.jsonl` below DATA (`prompt` and `completion`, or `text` and `label_text`), except for
the named tasks.
"""

from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from ..common import make_parser, read_rows
from ..models import train_from_scratch

PARTS, LABELLED = ("prompt", "completion"), ("text", "label_text")
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def texts(folder: Path, without: set[str]) -> list[str]:
    """Each row as one string in the format of the instruction tasks: a text, then `Output:` followed by the answer.

    A model that has seen many kinds of answers there is not surprised by those of a new task.
    """
    rows = []
    for file in sorted(folder.rglob("train.jsonl")):
        if file.parent.name not in without:
            for row in read_rows(file):
                asked, answer = (row[key] for key in (PARTS if "prompt" in row else LABELLED))
                rows.append(f"{asked.removesuffix('Output:').rstrip()}\nOutput:{answer}")
    return rows


def train_tokenizer(rows: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer."""
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
    """All rows concatenated and cut into blocks of equal length."""
    encoded = tokenizer([row + tokenizer.eos_token for row in rows])["input_ids"]
    stream = torch.tensor([token for row in encoded for token in row])
    stream = stream[: len(stream) // length * length].view(-1, length)
    return Dataset.from_dict({"input_ids": stream.tolist(), "labels": stream.tolist()})


def main() -> None:
    parser = make_parser(__file__, __doc__, output=False)
    parser.add_argument("--data", type=Path, required=True, help="folder with tasks at any depth")
    parser.add_argument("--output_dir", type=Path, required=True, help="where model and tokenizer go")
    parser.add_argument("--without", nargs="+", default=[], help="tasks to keep unseen")
    parser.add_argument("--vocabulary", type=int, default=384)
    parser.add_argument("--block", type=int, default=256, help="tokens of a training row")
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
    train_from_scratch(
        model,
        dataset,
        arguments.output_dir,
        per_device_train_batch_size=16,
        num_train_epochs=arguments.epochs,
        learning_rate=2e-3,
        weight_decay=0.05,
        logging_steps=100,
        seed=0,
    )
    model.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)


if __name__ == "__main__":
    main()
