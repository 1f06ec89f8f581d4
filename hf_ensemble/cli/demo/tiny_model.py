"""The tiny language model of the embedded demo: a word-level tokenizer and a Llama trained from scratch in a minute."""

import os
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .world import World

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
IGNORED_LABEL = -100


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """
    Builds the tokenizer in memory: one token for each word of the world.

    Words are split at white space and nowhere else, so a prompt's tokens are always the first tokens of prompt and
    completion.

    Args:
        world (`World`): The world whose vocabulary the tokenizer knows.
    """
    words = [PAD, EOS, UNK, *world.vocabulary()]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNK))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="right",
        model_max_length=64,
        # Without a decoder the words are joined by spaces; the clean-up would glue " :" to the word before it.
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """
    Builds the untrained model, about a third of a million parameters.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): Gives the size of the vocabulary and the special tokens.
        seed (`int`, *optional*, defaults to 0): Seed of the initial weights. The global random state is left as it was.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def encode_lines(lines: list[str], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """
    Turns whole lines into one right-padded batch, each line closed by the end-of-text token.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `labels`, each of shape (lines, longest line).
        Labels are -100 at the padding.
    """
    batch = tokenizer([f"{line} {EOS}" for line in lines], padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def train_base_model(
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    output_dir: str | os.PathLike,
    steps: int = 1200,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> LlamaForCausalLM:
    """
    Trains the base model on the world's text and saves model and tokenizer to `output_dir`.

    The length is a number of steps, not a time, so that the result follows from the arguments alone. No line is seen
    twice: the coin-flip answers to `pick` could be memorised otherwise.

    Args:
        world (`World`): The world whose pretraining text is read.
        tokenizer (`PreTrainedTokenizerFast`): The world's tokenizer, see [`build_tokenizer`].
        output_dir (`str` or `os.PathLike`): A folder that does not exist yet. It appears only once it is complete.
        steps (`int`, *optional*, defaults to 1200): Number of optimiser steps.
        batch_size (`int`, *optional*, defaults to 64): Lines per step.
        learning_rate (`float`, *optional*, defaults to 3e-3): The highest learning rate of the one-cycle schedule.
        seed (`int`, *optional*, defaults to 0): Seed of the initial weights and of the text.

    Raises:
        FileExistsError: If `output_dir` exists.
    """
    output_dir = Path(output_dir)
    if output_dir.exists():
        raise FileExistsError(
            f"The base model is written to a new folder, but {output_dir} exists. "
            "Load it with from_pretrained, or remove it."
        )
    model = build_model(tokenizer, seed=seed)
    text = encode_lines(world.pretraining_text(steps * batch_size, seed=seed), tokenizer)
    _fit(model, text, batch_size=batch_size, learning_rate=learning_rate)
    _save_whole(model, tokenizer, output_dir)
    return model


def _fit(model: LlamaForCausalLM, text: dict[str, torch.Tensor], batch_size: int, learning_rate: float) -> None:
    """Trains `model` in place, one pass over `text` in its order. Leaves the model in evaluation mode."""
    starts = range(0, len(text["input_ids"]), batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=len(starts), pct_start=0.1, cycle_momentum=False
    )
    model.train()
    progress = tqdm(starts, desc="Training the base model", unit="step")
    for step, start in enumerate(progress):
        loss = model(**{name: rows[start : start + batch_size] for name, rows in text.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def _save_whole(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output_dir: Path) -> None:
    """Writes to a sibling folder and renames it: a killed run leaves no half-written `output_dir`."""
    partial_dir = output_dir.with_name(f"{output_dir.name}.partial")
    shutil.rmtree(partial_dir, ignore_errors=True)
    partial_dir.mkdir(parents=True)
    model.save_pretrained(partial_dir)
    tokenizer.save_pretrained(partial_dir)
    os.replace(partial_dir, output_dir)
