"""Loads tasks from a folder of JSONL files."""

import json
from pathlib import Path

from datasets import Dataset

from .._settings import check_at_least, check_number, checked_mapping, checked_path
from ..errors import TaskError
from .rows import content_hash
from .task_set import SPLITS, TaskSet, table_error


def load_task_folder(
    folder: str | Path,
    validation_fraction: float | None = None,
    max_rows: dict[str, int] | None = None,
    sampling_weights: dict[str, float] | None = None,
    names: list[str] | None = None,
) -> TaskSet:
    """Load tasks from `NAME/{train,validation,test}.jsonl` or `NAME.jsonl`.

    Args:
        folder (`str` or `Path`): folder with one sub-folder or file per task.
        validation_fraction (`float`, *optional*):
            Share of a single `NAME.jsonl` to hold out for evaluation. Rows are assigned by a hash of their content, so
            the split does not depend on their order.
        max_rows (`dict[str, int]`, *optional*): maximum number of rows by split; the first rows of each file are used.
        sampling_weights (`dict[str, float]`, *optional*): see [`TaskSet`].
        names (`list[str]`, *optional*): names of the tasks to load. All by default.

    Raises:
        `ConfigurationError`: for arguments out of range.
        `TaskError`: for a folder without tasks, lines that are not JSON, and what [`TaskSet.from_datasets`] refuses.
    """
    check_number("validation_fraction", validation_fraction, 0, 1, above=True, optional=True)
    for split, limit in checked_mapping("max_rows", max_rows or {}).items():
        check_at_least(f"The maximum number of {split} rows", limit, 1)
    folder = checked_path("the folder of tasks", folder)
    if not folder.is_dir():
        raise TaskError(f"Expected a folder of JSONL tasks at {str(folder)!r}, found none.")
    sources: list[tuple[str, dict[str, Dataset]]] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and any((path / f"{split}.jsonl").is_file() for split in SPLITS):
            if names is None or path.name in names:
                files = {split: path / f"{split}.jsonl" for split in SPLITS if (path / f"{split}.jsonl").is_file()}
                sources.append((path.name, {split: _read_jsonl(file, path.name) for split, file in files.items()}))
        elif path.suffix == ".jsonl" and (names is None or path.stem in names):
            sources.append((path.stem, _hold_out(_read_jsonl(path, path.stem), validation_fraction)))
    missing = sorted(set(names or ()) - {name for name, _ in sources})
    if missing or not sources:
        raise TaskError(
            f"No task{f' named {missing}' if missing else ''} in {str(folder)!r}: expected NAME/train.jsonl and "
            "NAME/validation.jsonl, or NAME.jsonl."
        )
    for _, splits in sources:
        for split, limit in (max_rows or {}).items():
            if split in splits:
                splits[split] = splits[split].select(range(min(limit, len(splits[split]))))
    return TaskSet.from_datasets(sources, sampling_weights=sampling_weights)


def _read_jsonl(path: Path, name: str) -> Dataset:
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"Task {name!r}: line {number} of {str(path)!r}"
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
        raise TaskError(f"Task {name!r} is empty: {str(path)!r} has no rows. Add rows, or delete the file.")
    try:
        return Dataset.from_list(rows)
    except Exception as error:  # pyarrow raises unrelated exception classes here
        raise table_error(f"Task {name!r}, {path.name}", error) from error


def _hold_out(rows: Dataset, fraction: float | None) -> dict[str, Dataset]:
    if fraction is None:
        return {"train": rows}
    held_out = [int(content_hash(row), 16) / 2**64 < fraction for row in rows]
    return {
        "train": rows.select([i for i, out in enumerate(held_out) if not out]),
        "validation": rows.select([i for i, out in enumerate(held_out) if out]),
    }
