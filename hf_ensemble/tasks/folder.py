"""Loads tasks from a folder of JSONL files."""

import json
from pathlib import Path

from datasets import Dataset

from ..errors import TaskError
from .task_set import SPLITS, TaskSet


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
        `TaskError`: for a folder without tasks, lines that are not JSON, and what [`TaskSet.from_datasets`] refuses.
    """
    folder = Path(folder)
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
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TaskError(f"Task {name!r}: {path.name} line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise TaskError(f"Task {name!r}: {path.name} line {number}: expected an object, found {line[:40]!r}.")
            rows.append(row)
    if not rows:
        raise TaskError(f"Task {name!r} is empty: {path.name} has no rows.")
    try:
        return Dataset.from_list(rows)
    except Exception as error:  # pyarrow raises unrelated exception classes here
        raise TaskError(f"Task {name!r}: the rows of {path.name} do not form one table: {error}") from error
