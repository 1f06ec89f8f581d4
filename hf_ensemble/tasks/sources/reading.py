"""Reading datasets: the Hub, folders and files."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

from ...errors import TaskError
from ..task import SPLIT_ALIASES, table_error
from .source import DatasetSource

# Builders of `datasets`, by how names of files end. JSON lines are read here: lines are named in errors, and texts that
# look like dates stay texts.
_LINES = ".jsonl"
_BUILDERS = {".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
FILES = (_LINES, *_BUILDERS)
# Texts stay as they are in a CSV file: "007", "NA".
_TEXTS = ("prompt", "completion", "text", "label_text")


def read_source(task: str, source: DatasetSource) -> dict[str, Dataset]:
    """The rows of a dataset, in its own columns: training rows, and those of other splits that there are.

    Raises:
        `TaskError`: for datasets that cannot be found or read, and splits that they lack.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        rows = {"train": read_file(task, path, _text_columns(source))}
    elif path.is_dir() and source.data_files is None and (files := files_by_split(path)):
        rows = {split: read_file(task, file, _text_columns(source)) for split, file in files.items()}
    else:
        _refuse_missing(task, source.path, path)
        rows = dict(_load(task, source))
    own = {"train": _split(task, source, rows, source.split, "split")}
    if isinstance(source.validation, str):
        own["validation"] = _split(task, source, rows, source.validation, "validation")
    elif source.validation is None:
        found = next((alias for alias in SPLIT_ALIASES["validation"] if alias in rows), None)
        own |= {} if found is None else {"validation": rows[found]}
    if source.test is not None:
        own["test"] = _split(task, source, rows, source.test, "test")
    elif path.exists() and "test" in rows:
        # Test splits on the Hub often have no answers.
        own["test"] = rows["test"]
    return own


def files_by_split(folder: Path) -> dict[str, Path]:
    """The files of a folder that are named like a split, by the split's usual name.

    Raises:
        `TaskError`: for two files of one split.
    """
    found: dict[str, Path] = {}
    for split, aliases in SPLIT_ALIASES.items():
        files = [folder / f"{alias}{ending}" for alias in aliases for ending in FILES]
        files = [file for file in files if file.is_file()]
        if len(files) > 1:
            raise TaskError(
                f"{str(folder)!r} holds {[file.name for file in files]} for the split {split!r}. Keep one of them."
            )
        if files:
            found[split] = files[0]
    return found


def read_file(task: str, path: Path, texts: tuple[str, ...] = _TEXTS) -> Dataset:
    """The rows of a JSON, JSONL, CSV, TSV or Parquet file.

    Raises:
        `TaskError`: for other files, and for files that cannot be read or hold no rows.
    """
    if path.suffix == _LINES:
        return _read_lines(path, task)
    if path.suffix not in _BUILDERS:
        raise TaskError(
            f"Task {task!r}: expected a file that ends in {', '.join(FILES)}, found {str(path)!r}. Convert it."
        )
    options: dict[str, Any] = {}
    if _BUILDERS[path.suffix] == "csv":
        options = {"converters": dict.fromkeys(texts, str), "keep_default_na": False}
        options["sep"] = "\t" if path.suffix == ".tsv" else ","
    if path.stat().st_size == 0:
        raise TaskError(f"Task {task!r} is empty: {str(path)!r} has no rows. Add rows, or delete the file.")
    try:
        rows = load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train", **options)
    except Exception as error:  # pyarrow, pandas and datasets raise unrelated exception classes here
        raise TaskError(f"Task {task!r}: {str(path)!r} cannot be read: {_reason(error)}. Mend the file.") from error
    if not len(rows):
        raise TaskError(f"Task {task!r} is empty: {str(path)!r} has no rows. Add rows, or delete the file.")
    if options and len(rows.column_names) == 1 and any(mark in rows.column_names[0] for mark in ";\t|"):
        raise TaskError(
            f"Task {task!r}: expected columns separated by {options['sep']!r} in {str(path)!r}, found one column "
            f"{rows.column_names[0]!r:.80}. Save it with commas as .csv, or with tabs as .tsv."
        )
    return rows


def _text_columns(source: DatasetSource) -> tuple[str, ...]:
    """Columns of a CSV file that become texts."""
    renamed = source.columns.items() if isinstance(source.columns, Mapping) else ()
    return (*_TEXTS, *(old for old, new in renamed if new in _TEXTS))


def _load(task: str, source: DatasetSource) -> DatasetDict:
    """All splits of a dataset on the Hub, or of a folder as `datasets` understands it."""
    try:
        return load_dataset(
            source.path,
            source.name,
            revision=source.revision,
            data_dir=source.data_dir,
            data_files=source.data_files,
        )
    except Exception as error:  # datasets, the Hub's client and the parsers raise unrelated exception classes here
        raise TaskError(
            f"Dataset {task!r}: {source.path!r} cannot be loaded: {_reason(error)}. Check path, name and revision."
        ) from error


def _split(task: str, source: DatasetSource, rows: dict[str, Dataset], split: str, key: str) -> Dataset:
    """The rows of a split, of a part of one, or of another file."""
    if split in rows:
        return rows[split]
    file = Path(split).expanduser()
    if file.suffix in FILES:
        _refuse_missing(task, split, file)
        return read_file(task, file, _text_columns(source))
    whole = split.split("[")[0]
    if whole in rows and split.endswith("]"):
        return _part(task, rows[whole], split, key)
    raise TaskError(
        f"Dataset {task!r}: expected one of the splits {list(rows)} in {key}, found {split!r}. Set {key} to one of them"
        f"{', or to a number or share of rows to hold out' if key == 'validation' else ''}."
    )


def _part(task: str, rows: Dataset, split: str, key: str) -> Dataset:
    """Some rows of a split, as "train[:100]" or "train[10%:20%]" has them."""
    begin, colon, end = split[split.index("[") + 1 : -1].partition(":")
    try:
        if not colon:
            raise ValueError("no colon")
        bounds = [
            round(float(bound[:-1]) / 100 * len(rows)) if bound.endswith("%") else int(bound) if bound else None
            for bound in (begin.strip(), end.strip())
        ]
    except ValueError as error:
        raise TaskError(
            f"Dataset {task!r}: expected a part of a split like 'train[:1000]' or 'train[10%:20%]' in {key}, found "
            f"{split!r}. Correct it."
        ) from error
    return rows.select(range(*slice(*bounds).indices(len(rows))))


def _refuse_missing(task: str, given: str, path: Path) -> None:
    """Raise for what is meant as a file or folder, and is not there."""
    looks_local = path.suffix in FILES or given.startswith((".", "/", "~")) or given.count("/") > 1
    if path.exists() or not looks_local:
        return
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    there = sorted(own.name for own in folder.iterdir() if not own.name.startswith("."))
    missing = path.relative_to(folder).parts[0]
    near = difflib.get_close_matches(missing, there, n=1)
    meant = f" Did you mean {str(folder / near[0])!r}?" if near else f" {str(folder)!r} holds {there!s:.200}."
    raise TaskError(f"Dataset {task!r}: there is no file or folder {given!r}.{meant} Correct path.")


def _reason(error: BaseException) -> str:
    """What an exception says, in one line; of a chain, what began it."""
    while error.__cause__ is not None and "error occurred while generating" in str(error).lower():
        error = error.__cause__
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _read_lines(path: Path, task: str) -> Dataset:
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"Task {task!r}: line {number} of {str(path)!r}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise TaskError(
                    f"{where} is not JSON in UTF-8 ({error}). Expected one object on each line: correct or delete it."
                ) from error
            if not isinstance(row, dict):
                raise TaskError(f"{where}: expected an object, found {line[:40]!r}. Correct or delete the line.")
            rows.append(row)
    if not rows:
        raise TaskError(f"Task {task!r} is empty: {str(path)!r} has no rows. Add rows, or delete the file.")
    try:
        return Dataset.from_list(rows)
    except Exception as error:  # pyarrow raises unrelated exception classes here
        raise table_error(f"Task {task!r}, {path.name}", error) from error
