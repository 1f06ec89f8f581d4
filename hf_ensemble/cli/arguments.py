"""Flags and YAML of the commands."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..errors import ConfigurationError
from ..select import GROUPING_METHODS, SELECTION_METHODS


@dataclass
class DataArguments:
    """Which tasks a command works on, and how a text classifier is made of the model."""

    data: str | None = field(
        default=None, metadata={"help": "Folder of tasks: NAME/{train,validation,test}.jsonl, or NAME.jsonl."}
    )
    tasks: list[str] | None = field(default=None, metadata={"help": "Tasks of the folder to take; all by default."})
    validation_fraction: float | None = field(
        default=None, metadata={"help": "Share of a lone NAME.jsonl to hold out for evaluation."}
    )
    max_train_rows: int | None = field(default=None, metadata={"help": "Training rows of a task at most."})
    max_validation_rows: int | None = field(default=None, metadata={"help": "Validation rows of a task at most."})
    head: str = field(
        default="auto",
        metadata={
            "help": "Of text classification: 'label_similarity' (similarity to the labels' texts), 'linear' (the "
            "checkpoint's own, or a fresh one), or 'auto': linear where the checkpoint has a trained head."
        },
    )

    def __post_init__(self):
        if self.head not in ("auto", "linear", "label_similarity"):
            raise ConfigurationError(f"head has to be 'auto', 'linear' or 'label_similarity', found {self.head!r}.")


@dataclass
class RunArguments(DataArguments):
    """What `hf-ensemble run` takes beside a trainer's own arguments and trl's model arguments."""

    target: str | None = field(
        default=None, metadata={"help": "Choose auxiliary tasks for this one and train once, instead of an ensemble."}
    )
    fidelity_subsets: int = field(
        default=0, metadata={"help": "Random subsets to fine-tune for real, to compare predictions with the truth."}
    )
    fidelity_subset_size: int | None = field(
        default=None, metadata={"help": "Tasks of such a subset; all sizes in turn by default."}
    )


@dataclass
class FidelityArguments(DataArguments):
    """What `hf-ensemble fidelity` takes beside a trainer's own arguments and trl's model arguments."""

    num_subsets: int = field(default=20, metadata={"help": "Random subsets to fine-tune for real."})
    subset_sizes: list[int] | None = field(
        default=None, metadata={"help": "Numbers of tasks to take in turn; from one task to all by default."}
    )
    num_repeated: int = field(
        default=0, metadata={"help": "Of the subsets, how many to train with a second seed, for the noise ceiling."}
    )
    num_transplanted: int = field(
        default=3,
        metadata={"help": "Subsets whose optimum is put into the model, for the first-order error."},
    )
    subset_seed: int = field(default=0, metadata={"help": "Seed of the draw of subsets."})

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("num_subsets", 1), ("num_repeated", 0), ("num_transplanted", 0)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name} has to be {least} or more, found {getattr(self, name)}.")


@dataclass
class ChoiceArguments:
    """Where the gradients lie that a choice is made from, and where it goes."""

    store: str | None = field(
        default=None,
        metadata={"help": "Folder of captured gradients, or a run's output_dir: then its true fine-tunings calibrate."},
    )
    output_dir: str = field(default="choice", metadata={"help": "Where the choice and its pictures go."})
    tasks: list[str] | None = field(default=None, metadata={"help": "Tasks of the store to take; all by default."})
    num_components: int = field(default=400, metadata={"help": "Principal components of an estimate."})


@dataclass
class SelectArguments(ChoiceArguments):
    """What `hf-ensemble select` takes."""

    target: list[str] | None = field(default=None, metadata={"help": "What to do well on; all tasks by default."})
    method: str = field(default="forward", metadata={"help": f"One of {', '.join(SELECTION_METHODS)}."})
    max_tasks: int | None = field(default=None, metadata={"help": "Tasks to take beside the targets at most."})
    max_examples: int | None = field(default=None, metadata={"help": "Training rows of these tasks at most."})
    max_tokens: int | None = field(default=None, metadata={"help": "Answer tokens of these rows at most."})
    include: list[str] | None = field(
        default=None, metadata={"help": "Tasks that have to be in; the targets by default."}
    )
    exclude: list[str] | None = field(default=None, metadata={"help": "Tasks that have to be out."})
    metric: str = field(default="loss", metadata={"help": "'loss' or 'accuracy'."})
    clusters: dict[str, int] | str | None = field(
        default=None, metadata={"help": "Divide tasks into parts to choose among, as JSON: '{\"mr\": 5}'."}
    )
    score_examples: bool = field(default=False, metadata={"help": "Score every training row, too."})


@dataclass
class GroupArguments(ChoiceArguments):
    """What `hf-ensemble group` takes."""

    num_groups: int | None = field(default=None, metadata={"help": "Groups; found by predicted loss by default."})
    max_groups: int | None = field(default=None, metadata={"help": "Most groups to consider."})
    method: str = field(default="direct", metadata={"help": f"One of {', '.join(GROUPING_METHODS)}."})
    group_cost: float = field(default=0.0, metadata={"help": "What one more group has to gain, in nats."})
    overlap: bool = field(default=False, metadata={"help": "Let a task help other groups than its own."})
    seed: int = field(default=0, metadata={"help": "Seed of random subsets and clustering."})


@dataclass
class DemoArguments:
    """What `hf-ensemble demo` takes."""

    output_dir: str = field(default="demo_output", metadata={"help": "Where models, adapters and reports go."})
    seed: int = field(default=0, metadata={"help": "Seed of the world and of all training."})
    fidelity_subsets: int = field(default=4, metadata={"help": "Subsets to fine-tune for real, to check predictions."})


def with_config(argv: Sequence[str]) -> list[str]:
    """Flags, those of a `--config FILE.yaml` first, so that the command line has the last word.

    Raises:
        `ConfigurationError`: for a file that is missing or no mapping.
    """
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in argv:
        return argv
    position = argv.index("--config")
    if position + 1 == len(argv):
        raise ConfigurationError("--config takes a YAML file.")
    path = Path(argv[position + 1])
    if not path.is_file():
        raise ConfigurationError(f"No configuration file at {str(path)!r}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{str(path)!r} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{str(path)!r} has to map names to values, found {type(content).__name__}.")
    flags: list[str] = []
    for key, value in content.items():
        values = value if isinstance(value, list) else [value]
        flags += [f"--{key}", *map(_flag_text, values)]
    return flags + argv[:position] + argv[position + 2 :]


def _flag_text(value: Any) -> str:
    is_json = value is None or isinstance(value, (dict, bool))
    return json.dumps(value, default=str) if is_json else str(value)


def parse(
    classes: Sequence[type], argv: Sequence[str], remaining_allowed: bool = False, command: str = "run"
) -> tuple[list[Any], list[str]]:
    """Dataclasses from flags, and the flags that none of them knows.

    The value `null` is None for numbers that may be None, and the default elsewhere.

    Raises:
        `ConfigurationError`: for unknown flags, unless `remaining_allowed`.
    """
    parser = HfArgumentParser(tuple(classes), prog=f"hf-ensemble {command}", allow_abbrev=False)
    argv = _nulls(parser, classes, list(argv))
    *parsed, remaining = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if remaining and not remaining_allowed:
        raise ConfigurationError(f"Unknown arguments: {' '.join(remaining)}. See hf-ensemble {command} --help.")
    return parsed, remaining


def _nulls(parser: HfArgumentParser, classes: Sequence[type], argv: list[str]) -> list[str]:
    """Let the parser read `null` for numbers that may be None; take it away from other fields it knows."""
    hints = {name: hint for own in classes for name, hint in get_type_hints(own).items()}
    known = {flag: action for action in parser._actions for flag in action.option_strings}
    kept: list[str] = []
    for word in argv:
        action = known.get(kept[-1]) if kept and word == "null" else None
        if action is None:
            kept.append(word)
        elif action.type in (int, float) and action.nargs is None and type(None) in get_args(hints[action.dest]):
            action.type = _none_or(action.type)
            kept.append(word)
        else:
            kept.pop()
    return kept


def _none_or(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text == "null" else kind(text)
