"""Datasets as files, and flags of commands that work on them."""

import json
from pathlib import Path

FLAGS = {
    "use_cpu": "true",
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": "true",
    "num_train_epochs": "1",
    "projection_dim": "64",
    "num_components": "10",
    "lora_r": "2",
}


def flags(**more):
    return [word for key, value in {**FLAGS, **more}.items() for word in (f"--{key}", str(value))]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_tasks(folder: Path, tasks: dict[str, dict[str, list[dict]]]) -> str:
    """`NAME/SPLIT.jsonl` for each; the validation rows are the test rows too."""
    for name, splits in tasks.items():
        for split, rows in {**splits, "test": splits["validation"]}.items():
            write_rows(folder / name / f"{split}.jsonl", rows)
    return str(folder)
