"""Flags and YAML of the commands."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from .._settings import check_at_least, check_one_of
from ..errors import ConfigurationError
from ..select import GroupingSettings, SelectionSettings

_SIZES_HELP = "Numbers of tasks of the subsets, in turn; from one task to all by default."


@dataclass
class DataArguments:
    """Which tasks a command works on, and how a text classifier is made of the model."""

    data: str | None = field(
        default=None, metadata={"help": "Folder of tasks: NAME/{train,validation,test}.jsonl, or NAME.jsonl."}
    )
    tasks: list[str] | None = field(default=None, metadata={"help": "Tasks of the folder to use; all by default."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Maximum number of training rows per task."})
    max_validation_rows: int | None = field(
        default=None, metadata={"help": "Maximum number of validation rows per task."}
    )
    head: str = field(
        default="auto",
        metadata={
            "help": "Head of a text classifier: 'label_similarity' (similarity to the labels' texts), 'linear' (the "
            "checkpoint's own head, or a new one), or 'auto' (linear if the checkpoint has a trained head)."
        },
    )

    def __post_init__(self):
        check_one_of("head", self.head, ("auto", "linear", "label_similarity"))
        for name in ("max_train_rows", "max_validation_rows"):
            check_at_least(name, getattr(self, name), 1, optional=True)


@dataclass
class FlowArguments(DataArguments):
    """What `hf-ensemble run` takes beside a trainer's own arguments and trl's model arguments."""

    target: str | None = field(
        default=None,
        metadata={"help": "Select auxiliary tasks for this one and train once, instead of making an ensemble."},
    )
    answer_metrics: str | None = field(
        default=None,
        metadata={
            "help": "Also score generated answers: what to extract from them (the_answer_is, number_after_hashes, "
            'choice, yes_no, last_number, whole_text, or a regular expression), or JSON by task: \'{"gsm8k": '
            '{"extract": "number_after_hashes", "metrics": ["exact_match"], "max_new_tokens": 200}}\'.'
        },
    )
    fidelity_subsets: int = field(
        default=0, metadata={"help": "Random subsets to fine-tune, to compare predictions with the truth."}
    )
    fidelity_sizes: list[int] | None = field(default=None, metadata={"help": _SIZES_HELP})

    def __post_init__(self):
        super().__post_init__()
        check_at_least("fidelity_subsets", self.fidelity_subsets, 0)
        _check_sizes(self.fidelity_sizes)


@dataclass
class FidelityArguments(DataArguments):
    """What `hf-ensemble fidelity` takes beside a trainer's own arguments and trl's model arguments."""

    fidelity_subsets: int = field(default=20, metadata={"help": "Random subsets to fine-tune."})
    fidelity_sizes: list[int] | None = field(default=None, metadata={"help": _SIZES_HELP})
    num_repeated: int = field(
        default=0, metadata={"help": "Subsets to train with a second seed as well, for the noise ceiling."}
    )
    num_first_order: int = field(
        default=3,
        metadata={"help": "Subsets whose predicted parameters are put into the model, for the first-order error."},
    )
    subset_seed: int = field(default=0, metadata={"help": "Seed of the draw of subsets."})

    def __post_init__(self):
        super().__post_init__()
        least = {"fidelity_subsets": 1, "num_repeated": 0, "num_first_order": 0, "subset_seed": 0}
        for name, value in least.items():
            check_at_least(name, getattr(self, name), value)
        _check_sizes(self.fidelity_sizes)


def _check_sizes(sizes: list[int] | None) -> None:
    for size in sizes or ():
        check_at_least("Each of fidelity_sizes", size, 1)


@dataclass
class ChoiceArguments:
    """Where the gradients are that a choice is made from, and where it goes."""

    store: str | None = field(
        default=None,
        metadata={
            "help": "Folder of captured gradients, or the output_dir of a run, whose fine-tunings then calibrate the "
            "predictions."
        },
    )
    output_dir: str = field(default="choice", metadata={"help": "Where the choice and its pictures go."})
    tasks: list[str] | None = field(default=None, metadata={"help": "Tasks of the store to use; all by default."})
    num_components: int = field(default=400, metadata={"help": "Principal components that estimates are solved in."})

    def __post_init__(self):
        check_at_least("num_components", self.num_components, 1)


@dataclass
class SelectArguments(SelectionSettings, ChoiceArguments):
    """What `hf-ensemble select` takes."""

    target: list[str] | None = field(default=None, metadata={"help": "Tasks to do well on; all by default."})
    include: list[str] | None = field(
        default=None, metadata={"help": "Tasks that are always trained on; the targets by default."}
    )
    exclude: list[str] | None = field(default=None, metadata={"help": "Tasks that are never trained on."})
    clusters: dict[str, int] | str | None = field(
        default=None, metadata={"help": "Split tasks into clusters to choose among, as JSON: '{\"mr\": 5}'."}
    )
    score_examples: bool = field(default=False, metadata={"help": "Also score every training row."})


@dataclass
class GroupArguments(GroupingSettings, ChoiceArguments):
    """What `hf-ensemble group` takes."""

    seed: int = field(default=0, metadata={"help": "Seed of random subsets and clustering."})

    def __post_init__(self):
        super().__post_init__()
        check_at_least("seed", self.seed, 0)


@dataclass
class DemoArguments:
    """What `hf-ensemble demo` takes."""

    output_dir: str = field(default="demo_output", metadata={"help": "Where models, adapters and reports go."})
    seed: int = field(default=0, metadata={"help": "Seed of the world and of all trainings."})
    fidelity_subsets: int = field(
        default=4, metadata={"help": "Subsets to fine-tune, to check predictions; at most 5."}
    )

    def __post_init__(self):
        check_at_least("seed", self.seed, 0)
        check_at_least("fidelity_subsets", self.fidelity_subsets, 1)


def answer_metrics(text: str | None) -> str | dict[str, Any] | None:
    """What `answer_metrics` says: settings by task where it is JSON, else what to extract from every task's answers.

    Raises:
        `ConfigurationError`: for what begins like JSON and is not.
    """
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigurationError(
            f'answer_metrics has to be JSON like \'{{"gsm8k": "the_answer_is"}}\', found {text!r}: {error}.'
        ) from error


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
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{str(path)!r} is no text: {error}. Expected YAML in UTF-8.") from error
    except yaml.YAMLError as error:
        # The parser's own message quotes the line, which may hold a token.
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}: {getattr(error, 'problem', None) or 'syntax error'}"
        raise ConfigurationError(f"{str(path)!r} is not YAML{where}. Mend the file.") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{str(path)!r} has to map names to values, found {type(content).__name__}.")
    flags: list[str] = []
    for key, value in content.items():
        if not isinstance(key, str):
            raise ConfigurationError(f"{str(path)!r} has to map names to values, found the name {key!r}.")
        values = value if isinstance(value, list) else [value]
        flags += [f"--{key}", *map(_flag_text, values)]
    return flags + argv[:position] + argv[position + 2 :]


def _flag_text(value: Any) -> str:
    is_json = value is None or isinstance(value, (dict, bool))
    return json.dumps(value, default=str) if is_json else str(value)


def print_help(classes: Sequence[type], argv: Sequence[str], command: str) -> None:
    """Print the help of a command and exit, where it is asked for."""
    if {"-h", "--help"} & set(argv):
        parse(classes, ["--help"], command=command)


def parse(
    classes: Sequence[type], argv: Sequence[str], remaining_allowed: bool = False, command: str = "run"
) -> tuple[list[Any], list[str]]:
    """Dataclasses from flags, and the flags that none of them knows.

    The value `null` is None for numbers that may be None, and the default elsewhere.

    Raises:
        `ConfigurationError`: for values of the wrong type, and for unknown flags, unless `remaining_allowed`.
    """
    parser = _Parser(tuple(classes), prog=f"hf-ensemble {command}", allow_abbrev=False)
    argv = _nulls(parser, classes, list(argv))
    *parsed, remaining = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if remaining and not remaining_allowed:
        # Without their values: a token may be among them.
        unknown = [word.split("=")[0] for word in remaining if word.startswith("--")]
        named = " ".join(unknown) or "a word that belongs to no flag"
        raise ConfigurationError(f"Unknown arguments: {named}. See hf-ensemble {command} --help.")
    return parsed, remaining


class _Parser(HfArgumentParser):
    """A parser that raises its errors, which otherwise print every flag there is."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}. See {self.prog} --help.")


def _nulls(parser: HfArgumentParser, classes: Sequence[type], argv: list[str]) -> list[str]:
    """Let the parser read `null` for numbers that may be None; drop it for the other fields it knows."""
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
