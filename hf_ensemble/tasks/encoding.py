"""Tokenizes the rows of tasks."""

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from datasets import Dataset, IterableDataset, List, Value, concatenate_datasets

from ..errors import TaskError
from .answers import IGNORE_INDEX
from .class_labels import HIDDEN
from .columns import EXAMPLE_ID, META_COLUMNS, TASK, TaskCollator, column_names
from .labels import LabelSpace
from .rows import FURTHER_INPUTS, RowFormat

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


Rows = TypeVar("Rows", Dataset, IterableDataset)


def encode(
    dataset: Rows,
    tokenizer: "PreTrainedTokenizerBase",
    row_format: RowFormat,
    label_space: LabelSpace | None = None,
    max_length: int | None = None,
    encoder_decoder: bool = False,
) -> Rows:
    """Convert rows to `input_ids`, `attention_mask` and `labels`, and keep `task` and `example_id`.

    A classification label becomes the index of its output in `label_space`, or -100 where it is hidden; several labels
    of a row become a list of numbers. Prompts, and everything in a chat before the assistant's last turn, are masked
    with -100; every token of a plain text is an answer. A completion or text ends with the tokenizer's end-of-sequence
    token, as in trl. Rows of a stream are converted while they are read.

    Raises:
        `TaskError`: for rows without an answer token after truncation to `max_length`, and for rows that only an
            `SFTTrainer` makes tokens of.
    """
    if row_format is RowFormat.TOKENIZED:
        return dataset
    if row_format is RowFormat.SFT:
        raise TaskError(
            "Rows of the format 'sft' become tokens in an SFTTrainer alone, and there is none. Leave row_format out, "
            "or pass the rows with input_ids and labels."
        )
    encoders: dict[RowFormat, Callable] = {
        RowFormat.CLASSIFICATION: lambda row: _encode_classification(row, tokenizer, label_space, max_length),
        RowFormat.PROMPT_COMPLETION: lambda row: _encode_prompt_completion(row, tokenizer, max_length),
        RowFormat.CHAT: lambda row: _encode_chat(row, tokenizer, max_length),
        RowFormat.TEXT: lambda row: _encode_text(row, tokenizer, max_length),
    }
    if encoder_decoder:
        encoders[RowFormat.PROMPT_COMPLETION] = lambda row: _encode_apart(row, tokenizer, max_length)
    drop = [column for column in column_names(dataset) if column not in META_COLUMNS]
    options = {"desc": "Tokenizing", "load_from_cache_file": False} if isinstance(dataset, Dataset) else {}
    return dataset.map(encoders[row_format], remove_columns=drop, **options)


def joined(tables: Iterable[Dataset]) -> Dataset:
    """Token tables of several tasks as one; ids that are stored in different widths are widened.

    Raises:
        `TaskError`: for columns with different types.
    """
    tables = list(tables)
    for column in ("input_ids", "labels"):
        lists = [table for table in tables if isinstance(table.features.get(column), List)]
        if len({str(table.features[column]) for table in lists}) > 1:
            tables = [table.cast_column(column, List(Value("int64"))) if table in lists else table for table in tables]
    try:
        return concatenate_datasets(tables)
    except ValueError as error:
        names = [name for table in tables for name in table.unique(TASK)]
        raise TaskError(f"The rows of {names} cannot be put into one table: {error}") from error


def length_limit(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Maximum length from the tokenizer, or `None` if it has no limit, which it encodes as a huge number."""
    return tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None


def data_collator_for(
    row_format: RowFormat, tokenizer: "PreTrainedTokenizerBase", labels_are_tokens: bool
) -> TaskCollator:
    """A padding collator that keeps `task` and `example_id`."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    if labels_are_tokens:
        # Models with absolute positions were not trained with padding on the left; trl pads on the right, too.
        right = copy.copy(tokenizer)
        right.padding_side = "right"
        return TaskCollator(_PaddedInputs(DataCollatorForSeq2Seq(right, label_pad_token_id=IGNORE_INDEX), right))
    return TaskCollator(_PaddedInputs(DataCollatorWithPadding(tokenizer), tokenizer))


@dataclass
class _PaddedInputs:
    """Pads what `tokenizer.pad` leaves as it is: further inputs of some models, one for each token.

    Args:
        collator (`Callable`): pads the other columns.
        tokenizer (`PreTrainedTokenizerBase`): says on which side, and with which token.
    """

    collator: Callable[[list[Mapping[str, Any]]], Mapping[str, Any]]
    tokenizer: "PreTrainedTokenizerBase"

    def __call__(self, examples: list[Mapping[str, Any]]) -> dict[str, Any]:
        further = [name for name in FURTHER_INPUTS if name in examples[0]]
        rest = [{key: value for key, value in example.items() if key not in further} for example in examples]
        batch = dict(self.collator(rest))
        for name in further:
            batch[name] = self._padded(name, [example[name] for example in examples], batch["input_ids"].shape[1])
        return batch

    def _padded(self, name: str, rows: list[list[Any]], length: int) -> "torch.Tensor":
        import torch

        of_decoder = name.startswith("decoder_")
        length = max(map(len, rows)) if of_decoder else length
        fill: Any = [0] * len(rows[0][0]) if name == "bbox" else 0
        fill = self.tokenizer.pad_token_id if name == "decoder_input_ids" else fill
        is_left = self.tokenizer.padding_side == "left" and not of_decoder
        padding = [[fill] * (length - len(row)) for row in rows]
        return torch.tensor([[*more, *row] if is_left else [*row, *more] for row, more in zip(rows, padding)])


def _encode_classification(row, tokenizer, label_space, max_length):
    encoded = tokenizer(row["text"], truncation=max_length is not None, max_length=max_length)
    if not encoded["input_ids"]:
        raise TaskError(
            f"Task {row[TASK]!r}, example {row[EXAMPLE_ID]!r}: expected a text of at least one token, found "
            f"{row['text']!r:.60}. Drop the row."
        )
    label = row["label"]
    if isinstance(label, list):
        # What a binary cross-entropy over all labels takes.
        return {**encoded, "labels": [float(value) for value in label]}
    return {**encoded, "labels": IGNORE_INDEX if label == HIDDEN else label_space.output_of(row[TASK], label)}


def _encode_prompt_completion(row, tokenizer, max_length):
    if isinstance(row["prompt"], list):
        return _encode_messages(row, row["prompt"], row["prompt"] + row["completion"], tokenizer, max_length)
    prompt = tokenizer(row["prompt"])["input_ids"]
    return _mask_prefix(row, prompt, _with_eos(row["prompt"] + row["completion"], tokenizer), max_length)


def _encode_text(row, tokenizer, max_length):
    return _mask_prefix(row, [], _with_eos(row["text"], tokenizer), max_length)


def _with_eos(text, tokenizer):
    tokens = tokenizer(text)["input_ids"]
    has_end = tokenizer.eos_token_id is None or tokens[-1:] == [tokenizer.eos_token_id]
    return tokens if has_end else tokens + [tokenizer.eos_token_id]


def _encode_apart(row, tokenizer, max_length):
    if isinstance(row["prompt"], list):
        raise TaskError(
            f"Task {row[TASK]!r}: expected texts as prompts for an encoder-decoder model, found chats. Write each "
            "prompt and completion as one text."
        )
    limit = {"truncation": max_length is not None, "max_length": max_length}
    answer = tokenizer(text_target=row["completion"], **limit)["input_ids"]
    if tokenizer.eos_token_id is not None and answer[-1:] != [tokenizer.eos_token_id]:
        answer = [*answer, tokenizer.eos_token_id][:max_length]
    return {**tokenizer(row["prompt"], **limit), "labels": answer}


def _encode_chat(row, tokenizer, max_length):
    messages = row["messages"]
    if not messages or messages[-1]["role"] != "assistant":
        raise TaskError(
            f"Task {row[TASK]!r}: expected chats that end with an assistant's turn, found {messages!r:.120}. Drop the "
            "turns after it."
        )
    return _encode_messages(row, messages[:-1], messages, tokenizer, max_length)


def _encode_messages(row, before, messages, tokenizer, max_length):
    if tokenizer.chat_template is None:
        raise TaskError(
            f"Task {row[TASK]!r}: expected a tokenizer with a chat template for rows of messages, found none. Set "
            "tokenizer.chat_template, or use the tokenizer of an instruction-tuned model."
        )
    tools = row.get("tools")
    options = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
        "tokenize": True,
        "return_dict": False,
    }
    prompt = tokenizer.apply_chat_template(before, add_generation_prompt=True, **options)
    full = tokenizer.apply_chat_template(messages, **options)
    return _mask_prefix(row, prompt, full, max_length)


def _mask_prefix(row, prompt, full, max_length):
    start = next((i for i, (a, b) in enumerate(zip(prompt, full)) if a != b), min(len(prompt), len(full)))
    labels = [IGNORE_INDEX] * start + full[start:]
    if max_length is not None:
        full, labels = full[:max_length], labels[:max_length]
    # The first token cannot be predicted.
    if all(label == IGNORE_INDEX for label in labels[1:]):
        raise TaskError(
            f"Task {row[TASK]!r}, example {row['example_id']!r}: no answer token is left in {len(labels)} tokens "
            f"(max_length={max_length}). Raise max_length or drop the row."
        )
    return {"input_ids": full, "attention_mask": [1] * len(full), "labels": labels}
