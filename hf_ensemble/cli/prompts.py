"""Prompts that `hf-ensemble generate` answers: texts, or chats as lists of messages."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import ConfigurationError
from ..tasks.sources.reading import read_file
from .saved_arguments import GenerateArguments

_COLUMNS = ("prompt", "messages", "text")


@dataclass(frozen=True)
class Prompt:
    """What is asked.

    Args:
        content (`str` or `list[dict]`): a text, or a chat without its answer.
        task (`str`, *optional*): the task that it belongs to.
    """

    content: str | list[dict[str, Any]]
    task: str | None

    @property
    def last_text(self) -> str:
        """The text, or that of the last message."""
        return self.content if isinstance(self.content, str) else str(self.content[-1]["content"])


def prompts_of(arguments: GenerateArguments) -> list[Prompt]:
    """The prompts of the flags, of a file, or of stdin.

    Raises:
        `ConfigurationError`: without prompts, and for blank ones and rows that hold none.
        `TaskError`: for a file that cannot be read.
    """
    if arguments.prompts is not None and arguments.file is not None:
        raise ConfigurationError("Expected --prompts or --file, found both. Leave one of them out.")
    if arguments.file is not None:
        return _of_file(arguments.file, arguments.task)
    prompts = arguments.prompts
    if prompts is None:
        prompts = [] if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().splitlines()
    if not prompts:
        raise ConfigurationError("Expected --prompts TEXT ..., --file FILE, or lines on stdin; found none.")
    for number, prompt in enumerate(prompts):
        if not prompt.strip():
            raise ConfigurationError(
                f"Expected a text in every prompt, found none in prompt {number} (counted from 0)."
            )
    return [Prompt(prompt, arguments.task) for prompt in prompts]


def _of_file(file: str, task: str | None) -> list[Prompt]:
    path = Path(file)
    if not path.is_file():
        raise ConfigurationError(f"There is no file {file!r}. Correct --file.")
    table = read_file(path.stem, path)
    column = next((name for name in _COLUMNS if name in table.column_names), None)
    if column is None:
        raise ConfigurationError(
            f"Expected a column prompt, messages or text in {file!r}, found {table.column_names}. Rename one."
        )
    return [Prompt(_content(row[column], number, file), row.get("task") or task) for number, row in enumerate(table)]


def _content(value: Any, number: int, file: str) -> str | list[dict[str, Any]]:
    """A row's text, or its messages up to the question."""
    if isinstance(value, list):
        are_messages = all(isinstance(own, Mapping) and own.get("role") and own.get("content") for own in value)
        messages = [dict(own) for own in value] if are_messages else []
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if messages:
            return messages
    elif value is not None and str(value).strip():
        return str(value)
    raise ConfigurationError(
        f"{file!r}, row {number} (counted from 0): expected a text, or messages with a role and a content, found "
        f"{value!r:.80}. Correct the row or drop it."
    )


def texts_of(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, chat: bool) -> tuple[list[str], bool]:
    """The texts that a model reads, and whether they hold the special tokens of a chat template already.

    Args:
        prompts (`list[Prompt]`): texts or chats, not both.
        tokenizer (`PreTrainedTokenizerBase`): its chat template is put around chats.
        chat (`bool`): whether texts are the messages of a user.

    Raises:
        `ConfigurationError`: for chats and a tokenizer without a chat template.
    """
    chats = [
        own.content if isinstance(own.content, list) else [{"role": "user", "content": own.content}] for own in prompts
    ]
    if not chat and all(isinstance(own.content, str) for own in prompts):
        return [own.content for own in prompts], False
    if tokenizer.chat_template is None:
        what = "--chat" if chat else "prompts that are messages"
        remedy = "Leave it out, or name" if chat else "Make them texts, or name"
        raise ConfigurationError(
            f"Expected a tokenizer with a chat template for {what}, found none. {remedy} one with --tokenizer."
        )
    return [tokenizer.apply_chat_template(own, tokenize=False, add_generation_prompt=True) for own in chats], True
