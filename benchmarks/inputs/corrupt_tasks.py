"""Copy a folder of classification tasks and add two that no sound estimate should recommend.

    python -m benchmarks.inputs.corrupt_tasks --data CLASSIFICATION --output_dir TASKS

`sst2_flipped` is sst2 with its two labels swapped, `mr_shuffled` is mr with shuffled labels. Both take their training
rows from the end of the file, so that the first rows of the honest tasks do not reappear with other labels.
"""

import random
import shutil
from pathlib import Path

from ..common import SPLITS, make_parser, read_rows, write_rows


def flipped(rows: list[dict]) -> list[dict]:
    """Rows of two classes with their labels swapped."""
    text_of = {row["label"]: row["label_text"] for row in rows}
    swap = dict(zip(sorted(text_of), sorted(text_of, reverse=True)))
    return [{**row, "label": swap[row["label"]], "label_text": text_of[swap[row["label"]]]} for row in rows]


def shuffled(rows: list[dict], seed: int = 0) -> list[dict]:
    """Rows with shuffled labels."""
    labels = [(row["label"], row["label_text"]) for row in rows]
    random.Random(seed).shuffle(labels)
    return [{**row, "label": label, "label_text": text} for row, (label, text) in zip(rows, labels)]


def main() -> None:
    parser = make_parser(__file__, __doc__, output=False)
    parser.add_argument("--data", type=Path, required=True, help="folder of tasks, sst2 and mr among them")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the copy with two more tasks goes")
    arguments = parser.parse_args()
    shutil.copytree(arguments.data, arguments.output_dir, dirs_exist_ok=True)
    for name, origin, corrupt in (("sst2_flipped", "sst2", flipped), ("mr_shuffled", "mr", shuffled)):
        for split in SPLITS:
            rows = read_rows(arguments.data / origin / f"{split}.jsonl")
            corrupted = corrupt(rows[::-1] if split == "train" else rows)
            write_rows(arguments.output_dir / name / f"{split}.jsonl", corrupted)


if __name__ == "__main__":
    main()
