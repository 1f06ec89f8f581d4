"""What a model card shows of a task: a prompt, and where its rows come from."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from datasets.naming import camelcase_to_snakecase
from huggingface_hub import constants

from .task import Task

# The shortest of so many rows is shown, unless it is longer than this.
_NUM_CONSIDERED = 20
_MAX_CHARACTERS = 600
# Prompts of the row formats, of which a row has one.
_PROMPT_COLUMNS = ("prompt", "messages", "text")


def example_prompt(task: Task) -> str | list[dict[str, str]] | None:
    """A prompt of the task, as text or as messages; `None` where rows have none that is short enough to show."""
    rows = task.splits.get("validation", task.splits["train"])
    columns = [name for name in _PROMPT_COLUMNS if name in rows.column_names]
    rows = rows.select_columns(columns).select(range(min(_NUM_CONSIDERED, len(rows)))).with_format(None)
    prompts = [prompt for prompt in map(_prompt_of, rows) if prompt]
    shortest = min(prompts, key=_length, default=None)
    return None if shortest is None or _length(shortest) > _MAX_CHARACTERS else shortest


def _prompt_of(row: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    value = next((row[column] for column in _PROMPT_COLUMNS if row.get(column)), None)
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(own, Mapping) for own in value):
        return None
    messages = [{key: own.get(key) for key in ("role", "content")} for own in value]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    is_text = all(isinstance(entry, str) for own in messages for entry in own.values())
    return messages if messages and is_text else None


def _length(prompt: str | list[dict[str, str]]) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(own["content"]) for own in prompt)


def hub_datasets(tables: Iterable[Dataset]) -> list[str]:
    """Ids of the Hub's datasets that tables were loaded from, as far as the caches of `datasets` tell.

    The folder of a loaded dataset is called after its id, in lower case; the Hub's cache has the id itself.
    """
    root = Path(datasets.config.HF_DATASETS_CACHE).resolve()
    files = [Path(entry["filename"]).resolve() for table in tables for entry in table.cache_files]
    folders = [file.relative_to(root).parts[0] for file in files if file.is_relative_to(root)]
    downloaded = [path.name.split("--")[1:] for path in Path(constants.HF_HUB_CACHE).glob("datasets--*--*")]
    found = []
    for folder in dict.fromkeys(folders):
        owner, _, name = folder.partition("___")
        ids = [
            own for own in downloaded if len(own) == 2 and own[0] == owner and camelcase_to_snakecase(own[1]) == name
        ]
        # Two ids of one folder's name cannot be told apart.
        found += ["/".join(own) for own in ids if len(ids) == 1]
    return found
