"""Where the rows of a task come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..._settings import check_at_least, check_number
from ...errors import TaskError

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
            split of that name where the dataset has one; without any, a trainer holds some out.
        test (`str`, *optional*): rows for the final report: a split or a file.
        columns (`dict[str, str]` or `list[str]`, *optional*):
            New name of each column, by its name in the dataset; or the columns to keep.
        template (`dict[str, str]` or `str`, *optional*):
            New columns as texts with the dataset's columns in braces: `{"prompt": "{question}\\nAnswer:", "completion":
            " {answer}"}`. A single text makes the column `text`.
        weight (`float`, *optional*, defaults to 1.0): see `sampling_weights` of [`TaskSet`].
        max_rows (`int`, *optional*): maximum number of training rows: the first ones are used.
        fraction (`float`, *optional*): share of the datasets that have one, as in `trl.DatasetMixtureConfig`.
        data_dir (`str`, *optional*): see `datasets.load_dataset`.
        data_files (`str`, `list` or `dict`, *optional*): see `datasets.load_dataset`.
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
        source = cls(**given)
        source._check(task)
        return source

    def _check(self, task: str) -> None:
        where = f"of dataset {task!r}"
        for key in ("path", "name", "revision", "split", "test", "data_dir"):
            value = getattr(self, key)
            if not (isinstance(value, str) and value) and not (value is None and key not in ("path", "split")):
                raise TaskError(f"{key} {where} has to be a text, found {value!r:.60}. Correct it.")
        check_number(f"weight {where}", self.weight, 0, above=True, error=TaskError)
        check_at_least(f"max_rows {where}", self.max_rows, 1, optional=True, error=TaskError)
        check_number(f"fraction {where}", self.fraction, 0, above=True, optional=True, error=TaskError)
        if isinstance(self.validation, float):
            check_number(
                f"validation {where}, a share of its rows,", self.validation, 0, 1, above=True, error=TaskError
            )
        elif not isinstance(self.validation, (str, type(None))):
            check_at_least(f"validation {where}, a number of its rows,", self.validation, 1, error=TaskError)
        for key, kinds in {"columns": (Mapping, list, tuple), "template": (Mapping, str)}.items():
            value = getattr(self, key)
            of_texts = value is None or (isinstance(value, kinds) and all(isinstance(own, str) for own in value))
            if isinstance(value, Mapping):
                of_texts = of_texts and all(isinstance(own, str) for own in value.values())
            if not of_texts:
                expected = "map names to texts" if key == "template" else "map the dataset's columns to new names"
                raise TaskError(f"{key} {where} has to {expected}, found {value!r:.80}. Correct it.")
