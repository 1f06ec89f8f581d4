"""Copy a folder of tasks and add two that no honest estimate may recommend.

    python benchmarks/corrupt_tasks.py DIR TARGET

`sst2_flipped` is sst2 with its two labels swapped, `mr_shuffled` is mr with its labels dealt at random; both take their
training rows from the end of the file, so that the first rows of the honest tasks do not come again with another label.
"""

import json
import random
import shutil
import sys
from pathlib import Path

SPLITS = ("train", "validation", "test")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def flipped(rows: list[dict]) -> list[dict]:
    """Rows of two classes with the classes swapped."""
    text_of = {row["label"]: row["label_text"] for row in rows}
    swap = dict(zip(sorted(text_of), sorted(text_of, reverse=True)))
    return [{**row, "label": swap[row["label"]], "label_text": text_of[swap[row["label"]]]} for row in rows]


def shuffled(rows: list[dict], seed: int = 0) -> list[dict]:
    """Rows with their labels dealt anew."""
    labels = [(row["label"], row["label_text"]) for row in rows]
    random.Random(seed).shuffle(labels)
    return [{**row, "label": label, "label_text": text} for row, (label, text) in zip(rows, labels)]


def main(source: str, target: str) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)
    for name, origin, corrupt in (("sst2_flipped", "sst2", flipped), ("mr_shuffled", "mr", shuffled)):
        for split in SPLITS:
            rows = read(Path(source) / origin / f"{split}.jsonl")
            write(Path(target) / name / f"{split}.jsonl", corrupt(rows[::-1] if split == "train" else rows))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
