"""Loads tasks from a folder of JSONL files."""

import json
from pathlib import Path

from datasets import Dataset

from .._settings import check_at_least, checked_mapping, checked_path
from ..errors import TaskError
from .task import SPLITS, table_error
from .task_set import TaskSet


def load_task_folder(
    folder: str | Path,
    max_rows: dict[str, int] | None = None,
    sampling_weights: dict[str, float] | None = None,
    names: list[str] | None = None,
) -> TaskSet:
    """Load tasks from `NAME/{train,validation,test}.jsonl` or `NAME.jsonl`.

    Validation rows may be lacking: [`TaskSet.with_validation`] holds some out.

    Args:
        folder (`str` or `Path`): folder with one sub-folder or file per task.
        max_rows (`dict[str, int]`, *optional*): maximum number of rows by split; the first rows of each file are used.
        sampling_weights (`dict[str, float]`, *optional*): see [`TaskSet`].
        names (`list[str]`, *optional*): names of the tasks to load. All by default.

    Raises:
        `ConfigurationError`: for arguments out of range.
        `TaskError`: for a folder without tasks, lines that are not JSON, and what [`TaskSet.from_datasets`] refuses.
    """
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
            sources.append((path.stem, {"train": _read_jsonl(path, path.stem)}))
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
