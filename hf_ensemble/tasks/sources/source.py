"""Where the rows of a task come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..._settings import check_at_least, check_number
from ...errors import TaskError
from .formatting import template_fields

REMEDY = {
    "python": 'Write load_tasks({"NAME": {"path": ..., "columns": {...}}}).',
    "terminal": "Write in a --config file: datasets: {NAME: {path: ..., columns: {...}}}.",
}


@dataclass(frozen=True)
class DatasetSource:
    """Where the rows of one task come from, and how they become prompts and completions, or text with labels.

    Args:
        path (`str`): id of a dataset on the Hub, or a file (JSON, JSONL, CSV, TSV, Parquet) or folder.
        name (`str`, *optional*): configuration of the dataset ("subset" on the Hub).
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        split (`str`, *optional*, defaults to `"train"`): the training rows; `"train[:1000]"` takes some of them.
        validation (`str`, `float` or `int`, *optional*):
            The evaluation rows: a split, a file, or the share or number of training rows to hold out. By default the
            split of that name where the dataset has one that is not trained or tested on; without any, a trainer holds
            some out.
        test (`str`, *optional*):
            Rows for the final report: a split or a file. By default the split of that name of a file or folder, where
            nothing else takes it.
        columns (`dict[str, str]` or `list[str]`, *optional*):
            New name of each column, by its name in the dataset; or the columns to keep.
        template (`dict[str, str]` or `str`, *optional*):
            New columns as texts with the dataset's columns in braces: `{"prompt": "{question}\\nAnswer:", "completion":
            " {answer}"}`. A single text makes the column `text`. Missing values are shown as nothing; rows that have
            none of a text's values are refused.
        weight (`float`, *optional*, defaults to 1.0): see `sampling_weights` of [`TaskSet`].
        max_rows (`int`, *optional*):
            Maximum number of training rows, those that are held out among them: the first ones are used.
        fraction (`float`, *optional*): share of the datasets that have one, as in `trl.DatasetMixtureConfig`.
        data_dir (`str`, *optional*): see `datasets.load_dataset`.
        data_files (`str`, `list` or `dict`, *optional*): see `datasets.load_dataset`.

    Raises:
        `TaskError`: for values of another kind or out of range, and templates that cannot be read.
    """

    path: str
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    validation: str | float | int | None = None
    test: str | None = None
    columns: Mapping[str, str] | Sequence[str] | None = None
    template: Mapping[str, str] | str | None = None
    weight: float = 1.0
    max_rows: int | None = None
    fraction: float | None = None
    data_dir: str | None = None
    data_files: Any = field(default=None)

    def __post_init__(self):
        if isinstance(self.path, Path):
            object.__setattr__(self, "path", str(self.path))
        for key in ("path", "name", "revision", "split", "test", "data_dir"):
            value = getattr(self, key)
            if not (isinstance(value, str) and value) and not (value is None and key not in ("path", "split")):
                raise TaskError(f"{key} has to be a text, found {value!r:.60}. Correct it.")
        check_number("weight", self.weight, 0, above=True, error=TaskError)
        check_at_least("max_rows", self.max_rows, 1, optional=True, error=TaskError)
        check_number("fraction", self.fraction, 0, above=True, optional=True, error=TaskError)
        if isinstance(self.validation, float):
            check_number("validation, a share of the rows,", self.validation, 0, 1, above=True, error=TaskError)
        elif not isinstance(self.validation, (str, type(None))):
            check_at_least("validation, a number of rows,", self.validation, 1, error=TaskError)
        self._check_columns()
        files = self.data_files
        groups = list(files.values()) if isinstance(files, Mapping) else [files]
        if files is not None and not all(isinstance(own, str) or _are_texts(own) for own in groups):
            raise TaskError(f"data_files has to be a text, a list of texts, or these by split, found {files!r:.80}.")

    def _check_columns(self) -> None:
        for key, kinds in {"columns": (Mapping, list, tuple), "template": (Mapping, str)}.items():
            value = getattr(self, key)
            of_texts = value is None or (isinstance(value, kinds) and len(value) > 0 and _are_texts(list(value)))
            if isinstance(value, Mapping):
                of_texts = of_texts and _are_texts(list(value.values()))
            if not of_texts:
                expected = "map names to texts" if key == "template" else "map the dataset's columns to new names"
                raise TaskError(f"{key} has to {expected}, found {value!r:.80}. Correct it.")
        for column, text in self.templates.items():
            try:
                template_fields(text)
            except ValueError as error:
                raise TaskError(
                    f"the template of {column!r}, {text!r:.60}, cannot be read ({error}). Write braces that are meant "
                    "as such twice: {{ and }}."
                ) from error

    @property
    def templates(self) -> Mapping[str, str]:
        """The template of each new column; none where the dataset's own columns are used."""
        return {"text": self.template} if isinstance(self.template, str) else self.template or {}

    @classmethod
    def of(cls, task: str, given: Any) -> "DatasetSource":
        """From a path, or from a mapping of the arguments.

        Raises:
            `TaskError`: for anything else, unknown keys, and values of another kind.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, (str, Path)):
            given = {"path": str(given)}
        if not isinstance(given, Mapping) or "path" not in given:
            raise TaskError(f"Dataset {task!r}: expected a path, or a mapping with one, found {given!r:.80}.", **REMEDY)
        known = [own.name for own in fields(cls)]
        unknown = sorted(set(given) - set(known), key=str)
        if unknown:
            raise TaskError(f"Dataset {task!r}: unknown keys {unknown}; known are {', '.join(known)}. Correct them.")
        try:
            return cls(**given)
        except TaskError as error:
            raise TaskError(f"Dataset {task!r}: {error}") from error


def _are_texts(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, str) and value for value in values)
