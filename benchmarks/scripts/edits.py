"""The lines of a script that change when a trainer of ours takes its parent's place."""

import difflib
from collections.abc import Sequence

# Text that stands once in the script, and what takes its place.
Edit = tuple[str, str]

MAX_LINES = 5

SFT: list[Edit] = [
    ("    from trl import SFTTrainer, get", "    from hf_ensemble import EnsembleSFTTrainer\n    from trl import get"),
    ("trainer = SFTTrainer(", "trainer = EnsembleSFTTrainer("),
    (
        "script_args.dataset_name:\n        dataset = get_dataset(dataset_args)\n    elif not",
        "script_args.dataset_name:\n        dataset = "
        "{split: {own.path.split('/')[-1]: load_dataset(own.path, split=split) "
        "for own in dataset_args.datasets} for split in ('train', 'test')}\n    elif not",
    ),
]

GLUE: list[Edit] = [
    ("import evaluate\n", "import evaluate\nfrom peft import LoraConfig\nfrom hf_ensemble import EnsembleTrainer\n"),
    ("trainer = Trainer(", "trainer = EnsembleTrainer("),
    (
        "        model=model,\n",
        "        model=model, peft_config=LoraConfig(task_type='SEQ_CLS'),\n",
    ),
    (
        "train_dataset=train_dataset if",
        "train_dataset={name: train_dataset.filter(lambda row: row['task'] == name) "
        "for name in train_dataset.unique('task')} if",
    ),
]


def edited(text: str, edits: Sequence[Edit]) -> str:
    """A script with the edits made.

    Raises:
        `ValueError`: when a text does not stand in the script exactly once, or more than `MAX_LINES` lines change.
    """
    new = text
    for old, replacement in edits:
        if new.count(old) != 1:
            raise ValueError(f"Expected {old!r} once in the script, found it {new.count(old)} times.")
        new = new.replace(old, replacement)
    changed = changed_lines(text, new)
    if changed > MAX_LINES:
        raise ValueError(f"Expected at most {MAX_LINES} changed lines, found {changed}.")
    return new


def changed_lines(old: str, new: str) -> int:
    """Lines that are new or other ones, or that are gone if these are more."""
    marks = [line[0] for line in difflib.ndiff(old.splitlines(), new.splitlines())]
    return max(marks.count("+"), marks.count("-"))
