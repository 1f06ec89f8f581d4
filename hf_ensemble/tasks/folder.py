"""Loads tasks from a folder of files."""

from pathlib import Path

from datasets import Dataset

from .._settings import checked_path
from ..errors import TaskError
from ..logging import get_logger
from .sources.limits import checked_limits, first_rows_of
from .sources.reading import FILES, files_by_split, read_file, what_is_there
from .task_set import TaskSet

logger = get_logger(__name__)

_EXPECTED = "NAME/train.jsonl and NAME/validation.jsonl, or NAME.jsonl (.json, .csv, .tsv and .parquet, too)"
# Files that people keep rows in as well.
_LIKE_ROWS = (".ndjson", ".arrow", ".gz", ".bz2", ".xz", ".zst", ".zip")
_ADVICE = "Rename the files, or name each with load_tasks."


def load_task_folder(
    folder: str | Path,
    max_rows: dict[str, int] | None = None,
    sampling_weights: dict[str, float] | None = None,
    names: list[str] | None = None,
) -> TaskSet:
    """Load tasks from `NAME/{train,validation,test}.jsonl` or `NAME.jsonl`, or the same as JSON, CSV, TSV or Parquet.

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
    limits = checked_limits(max_rows)
    folder = checked_path("the folder of tasks", folder)
    if folder.is_file():
        raise TaskError(
            f"Expected a folder of tasks at {str(folder)!r}, found a file.",
            python=f"Pass its folder, or load it with load_tasks({{{folder.stem!r}: {str(folder)!r}}}).",
            terminal=f"Name its folder, or the dataset: --data {folder.stem}={folder}.",
        )
    if not folder.is_dir():
        raise TaskError(
            f"Expected a folder of tasks at {str(folder)!r}, found none.{what_is_there(folder)} Correct it."
        )
    own = files_by_split(folder)
    if "train" in own:
        raise TaskError(
            f"{str(folder)!r} holds the splits of one dataset, {sorted(file.name for file in own.values())}, and a "
            "folder or file for each dataset was expected.",
            python="Pass the folder above, or load_tasks({NAME: folder, ...}).",
            terminal="Name the folder above, or several datasets: --data NAME=FOLDER NAME=FILE.",
        )
    sources: list[tuple[str, dict[str, Dataset]]] = []
    there, left_out = [], []
    for path in sorted(folder.iterdir()):
        files = files_by_split(path) if path.is_dir() else {"train": path} if path.suffix in FILES else {}
        name = path.name if path.is_dir() else path.stem
        if not files and not (path.is_dir() and _others(path)):
            if path.is_file() and path.suffix.lower() in (*FILES, *_LIKE_ROWS):
                left_out.append(path.name)
            continue
        there.append(name)
        if names is not None and name not in names:
            continue
        if not files:
            raise TaskError(
                f"Task {name!r}: expected train.jsonl, validation.jsonl or test.jsonl (or the like) in {str(path)!r}, "
                f"found {_others(path)!s:.200}. {_ADVICE}"
            )
        sources.append((name, {split: read_file(name, file) for split, file in files.items()}))
    if left_out and sources:
        logger.warning("Not read in %r: %s. Expected names that end in %s.", str(folder), left_out, ", ".join(FILES))
    missing = sorted(set(names or ()) - set(there))
    if missing or not sources:
        content = sorted(own.name for own in folder.iterdir()) or "nothing"
        found = f"the tasks there are {there}" if there else f"expected {_EXPECTED}, found {content!s:.200}"
        raise TaskError(f"No task{f' named {missing}' if missing else ''} in {str(folder)!r}: {found}. {_ADVICE}")
    cut = [(name, first_rows_of(splits, limits)) for name, splits in sources]
    return TaskSet.from_datasets(cut, sampling_weights=sampling_weights)


def _others(folder: Path) -> list[str]:
    """Names of the data files of a folder."""
    return sorted(own.name for own in folder.iterdir() if own.suffix in FILES)
