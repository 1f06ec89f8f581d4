"""Rows that `trl.SFTTrainer` makes tokens of: the columns that it reads, and what their values have to be."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from ..errors import TaskError
from .columns import META_COLUMNS
from .row_checks import (
    IMAGE_COLUMNS,
    fault_of_extras,
    fault_of_messages,
    fault_of_strings,
    numbered_rows,
    prompt_fault,
    row_error,
    token_fault,
)
from .rows import unknown_columns

if TYPE_CHECKING:
    from trl import SFTConfig


@dataclass(frozen=True)
class SFTRows:
    """How a trainer reads its rows; columns that it does not read may hold anything.

    It reads tokens where there are some, else prompts and completions, else messages, else a text.

    Args:
        text_column (`str`, *optional*, defaults to `"text"`): the trainer's `dataset_text_field`.
        has_formatting (`bool`, *optional*, defaults to `False`):
            Whether the trainer has a `formatting_func`, which makes a text of each row.
        is_prepared (`bool`, *optional*, defaults to `False`): whether the trainer takes rows as they are.
    """

    text_column: str = "text"
    has_formatting: bool = False
    is_prepared: bool = False

    @classmethod
    def of(cls, args: "SFTConfig", formatting_func: Callable | None) -> "SFTRows":
        """How an `SFTTrainer` with these arguments reads its rows."""
        is_prepared = bool((args.dataset_kwargs or {}).get("skip_prepare_dataset"))
        return cls(args.dataset_text_field, formatting_func is not None, is_prepared)

    def check(self, task: str, split: str, rows: Dataset) -> None:
        """Check the columns and values of one split of a task, before anything is made of them.

        Raises:
            `TaskError`: for columns that no tokens can be made of, and for the first row with another kind of value.
        """
        self.check_columns(task, split, rows.column_names)
        read = {"input_ids", "labels", "attention_mask", "token_type_ids", "completion_mask", "assistant_masks"}
        read |= {"prompt", "completion", "messages", "conversations", "tools", "chat_template_kwargs"}
        columns = [column for column in rows.column_names if column in read | {self.text_column}]
        for number, row in numbered_rows(rows, columns):
            self.check_row(task, split, number, row)

    def check_columns(self, task: str, split: str, columns: Collection[str]) -> None:
        """Raise `TaskError` for columns that no tokens can be made of."""
        found = set(columns) - set(META_COLUMNS)
        if self.is_prepared or "input_ids" in found:
            return
        if "prompt" in found and self.has_formatting:
            raise TaskError(
                f"Task {task!r}, split {split!r}: expected no column 'prompt' beside a formatting_func, since trl "
                f"reads it in place of the text that the function makes; found {sorted(found)}. Rename it, or leave "
                "formatting_func out."
            )
        if "prompt" in found and "completion" not in found:
            raise TaskError(
                f"Task {task!r}, split {split!r}: expected the columns prompt + completion, found {sorted(found)}, "
                "which lack 'completion'. Add the answers, remove 'prompt' from rows that are messages or texts, or "
                "leave the split out."
            )
        known = [("prompt", "completion"), ("messages",), ("conversations",), (self.text_column,), ("input_ids",)]
        makes_text = self.has_formatting and self.text_column == "text"
        is_image = any(column in found for column in IMAGE_COLUMNS)
        if not makes_text and not is_image and not any(found.issuperset(form) for form in known):
            raise unknown_columns(task, found, known, split)

    def check_row(self, task: str, split: str, number: int, row: Mapping[str, Any]) -> None:
        """Raise `TaskError` for a row with a missing value or one of another kind."""
        fault = self._fault(row)
        if fault is not None:
            raise row_error(task, split, number, fault)

    def _fault(self, row: Mapping[str, Any]) -> str | None:
        if "input_ids" in row:
            labels = row.get("labels", row["input_ids"])
            if not isinstance(labels, list):
                return f"expected token ids in 'labels', found {labels!r:.60}"
            return token_fault({**row, "labels": labels})
        if self.is_prepared:
            return None
        is_chat = {name: _is_chat(row.get(name)) for name in ("messages", "conversations")}
        text = (self.text_column,) if self.text_column in row else ()
        if self.has_formatting:
            read = next((name for name, found in is_chat.items() if found), None)
            if read is not None:
                return f"expected no messages beside a formatting_func, since trl reads them; found them in {read!r}"
            fault = None if self.text_column == "text" else fault_of_strings(row, text)
        elif "prompt" in row and "completion" in row:
            # Beside texts trl ends the text column, too.
            fault = prompt_fault(row) or (fault_of_strings(row, text) if isinstance(row["prompt"], str) else None)
        elif text and not any(is_chat.values()):
            fault = fault_of_strings(row, text)
        elif "conversations" in row:
            fault = fault_of_messages(row["conversations"], "conversations", ("from", "value"))
        else:
            fault = fault_of_messages(row["messages"], "messages") if "messages" in row else None
        return fault or fault_of_extras(row)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
