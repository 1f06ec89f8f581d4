"""Reading datasets: the Hub, folders and files."""

import difflib
import json
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

from ...errors import TaskError
from ..task import SPLIT_ALIASES, table_of
from .formatting import template_fields
from .source import DatasetSource
from .split_parts import SplitPart

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
        `TaskError`: for datasets that cannot be found or read, splits that they lack, and rows that two splits share.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        files = {"train": path}
    elif path.is_dir() and source.data_files is None:
        files = files_by_split(path)
    else:
        files = {}
    if files:
        rows = {split: read_file(task, file, _text_columns(source)) for split, file in files.items()}
    else:
        _refuse_missing(task, source.path, path)
        rows = dict(_load(task, source))
    places = {split: str(file.resolve()) for split, file in files.items()}
    wanted = {"train": source.split, "validation": source.validation, "test": source.test}
    chosen = {
        split: _part_named(task, source, rows, places, name, "split" if split == "train" else split)
        for split, name in wanted.items()
        if isinstance(name, str)
    }
    _refuse_shared(task, source, chosen)
    for split in ("validation", "test"):
        # Test splits on the Hub often have no answers.
        is_read = wanted[split] is None and (split == "validation" or path.exists())
        alias = next((own for own in SPLIT_ALIASES[split] if own in rows), None) if is_read else None
        if alias is not None:
            own = SplitPart(places.get(alias, alias), rows[alias], range(len(rows[alias])))
            # What is trained on, or evaluated on, is nothing else as well.
            if not any(own.shared_with(other) for other in chosen.values()):
                chosen[split] = own
    return {split: own.table for split, own in chosen.items()}


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
    """Columns of a CSV file that become texts: a template shows them as they stand, unless it formats numbers."""
    fields = [template_fields(text) for text in source.templates.values()]
    shown = {name for own in fields for name in own} - {name for own in fields for name, how in own.items() if how}
    texts = {*_TEXTS, *shown}
    renamed = source.columns.items() if isinstance(source.columns, Mapping) else ()
    return tuple(texts | {old for old, new in renamed if new in texts})


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
            f"Dataset {task!r}: {source.path!r} cannot be loaded: {_reason(error)}.{_near_here(source)} Check path, "
            "name and revision."
        ) from error


def _part_named(
    task: str, source: DatasetSource, rows: Mapping[str, Dataset], places: Mapping[str, str], name: str, key: str
) -> SplitPart:
    """The rows of a split, of a part of one, or of another file."""
    whole, bracket, _ = name.partition("[")
    split = next((own for own in (whole, *_aliases(whole)) if own in rows), None)
    if split is not None and (not bracket or name.endswith("]")):
        return SplitPart.of(task, rows[split], places.get(split, split), name, key)
    file = Path(name).expanduser()
    if file.suffix in FILES:
        _refuse_missing(task, name, file)
        table = read_file(task, file, _text_columns(source))
        return SplitPart(str(file.resolve()), table, range(len(table)))
    raise TaskError(
        f"Dataset {task!r}: expected one of the splits {list(rows)} in {key}, found {name!r}. Set {key} to one of them"
        f"{', or to a number or share of rows to hold out' if key == 'validation' else ''}."
    )


def _aliases(split: str) -> tuple[str, ...]:
    """Other names of a split."""
    return next((aliases for aliases in SPLIT_ALIASES.values() if split in aliases), ())


def _refuse_shared(task: str, source: DatasetSource, chosen: Mapping[str, SplitPart]) -> None:
    """Raise for splits that have rows in common: nothing is learned from rows that were trained or chosen on."""
    keys = {"train": "split", "validation": "validation", "test": "test"}
    for one, other in combinations(chosen, 2):
        shared = chosen[one].shared_with(chosen[other])
        if shared:
            names = [f"{keys[own]} {getattr(source, keys[own])!r}" for own in (one, other)]
            raise TaskError(
                f"Dataset {task!r}: expected different rows in {names[0]} and {names[1]}, found {shared} in both. Name "
                "other rows, such as 'train[:80%]' and 'train[80%:]', or leave one out."
            )


def _refuse_missing(task: str, given: str, path: Path) -> None:
    """Raise for what is meant as a file or folder, and is not there."""
    looks_local = path.suffix in FILES or given.startswith((".", "/", "~")) or given.count("/") > 1
    if path.exists() or not looks_local:
        return
    raise TaskError(f"Dataset {task!r}: there is no file or folder {given!r}.{what_is_there(path)} Correct path.")


def _near_here(source: DatasetSource) -> str:
    """What there is on this machine in the place of an id of the Hub that cannot be loaded."""
    path = Path(source.path)
    if path.exists() or source.data_files is not None:
        return ""
    there = what_is_there(path)
    return f" Nor is there a file or folder of that name.{there}" if "Did you" in there or path.parent.is_dir() else ""


def what_is_there(missing: Path) -> str:
    """The nearest name in the folder where the first missing part of a path would stand, or all names in it."""
    folder = missing.parent
    while not folder.is_dir():
        folder = folder.parent
    there = sorted(own.name for own in folder.iterdir() if not own.name.startswith("."))
    near = difflib.get_close_matches(missing.relative_to(folder).parts[0], there, n=1)
    return f" Did you mean {str(folder / near[0])!r}?" if near else f" {str(folder)!r} holds {there!s:.200}."


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
    return table_of(rows, f"Task {task!r}, {path.name}")
