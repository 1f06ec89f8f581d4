"""Copy a folder of multiple-choice tasks so that a task's labels are the same in all of its rows.

    python -m benchmarks.inputs.lettered_choices --data CHOICES --output_dir LETTERED

Where a task's choices differ from row to row, its texts list them as (A), (B), ..., and the letter becomes the label.
"""

from pathlib import Path

from ..common import SPLITS, make_parser, read_rows, write_rows

LETTERS = "ABCDEFGH"
COLUMNS = ("text", "label", "label_text")


def lettered(rows: list[dict]) -> list[dict]:
    """Rows with the letters of their right choices as labels.

    Raises:
        ValueError: If a text does not list its choices.
    """
    for row in rows:
        for letter, choice in zip(LETTERS, row["choices"]):
            if f"({letter}) {choice}" not in row["text"]:
                raise ValueError(f"Expected the choice '({letter}) {choice}' in the text, found: {row['text']}")
    return [{**row, "label_text": LETTERS[row["label"]]} for row in rows]


def main() -> None:
    parser = make_parser(__file__, __doc__, output=False)
    parser.add_argument("--data", type=Path, required=True, help="folder of tasks whose rows have `choices`")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the copy goes")
    arguments = parser.parse_args()
    for folder in sorted(path for path in arguments.data.iterdir() if path.is_dir()):
        splits = {split: read_rows(folder / f"{split}.jsonl") for split in SPLITS}
        differ = len({tuple(row["choices"]) for rows in splits.values() for row in rows}) > 1
        for split, rows in splits.items():
            kept = [{name: row[name] for name in COLUMNS} for row in (lettered(rows) if differ else rows)]
            write_rows(arguments.output_dir / folder.name / f"{split}.jsonl", kept)


if __name__ == "__main__":
    main()
