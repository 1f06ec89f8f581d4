"""Flags and YAML of the commands."""

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from .._settings import check_at_least, check_number, check_one_of
from ..errors import ConfigurationError
from ..tasks.task import SPLITS

_SIZES_HELP = "Numbers of tasks of the subsets, in turn; from one task to all by default."


@dataclass
class DataArguments:
    """Which tasks a command works on."""

    data: list[str] | None = field(
        default=None,
        metadata={
            "help": "A folder with NAME/{train,validation,test}.jsonl or NAME.jsonl for each dataset; or files, "
            "folders and ids of datasets on the Hub, each as PATH or NAME=PATH. JSON, JSONL, CSV, TSV and Parquet."
        },
    )
    datasets: list[str] | None = field(
        default=None,
        metadata={
            "help": "The datasets by name, in a --config file: {NAME: {path, name, revision, split, validation, test, "
            "columns, template, weight, max_rows}}; or a list of them, as in trl's mixtures. JSON on the command line."
        },
    )
    dataset_mixture: str | None = field(
        default=None, metadata={"help": "trl's mixture, in a --config file: {datasets: [...], test_split_size: ...}."}
    )
    test_split_size: float | None = field(
        default=None, metadata={"help": "Share of each dataset without evaluation rows to hold out, as in trl."}
    )
    tasks: list[str] | None = field(default=None, metadata={"help": "Names of the datasets to use; all by default."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Maximum number of training rows per task."})
    max_validation_rows: int | None = field(
        default=None, metadata={"help": "Maximum number of validation rows per task."}
    )

    def __post_init__(self):
        check_number("test_split_size", self.test_split_size, 0, 1, above=True, optional=True)
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
class CompareArguments(FlowArguments):
    """What `hf-ensemble compare` takes beside a trainer's own arguments and trl's model arguments."""

    baselines: list[str] = field(
        default_factory=lambda: ["all"],
        metadata={
            "help": "What the ensemble is compared with: all, or some of longer, wider, per_task, finetuned, "
            "random_groups, gradient_clusters, average, task_arithmetic, ties, tsv, knots, lorahub, arrow, seeds."
        },
    )
    finetuned_length: float = field(
        default=0.5,
        metadata={"help": "finetuned: length of each task's own training, in multiples of a training."},
    )
    num_compared_groups: int | None = field(
        default=None,
        metadata={"help": "Number of random groups and of clusters; as many as the ensemble has by default."},
    )
    num_compared_seeds: int | None = field(
        default=None, metadata={"help": "Number of seeds; as many as the ensemble has adapters by default."}
    )
    group_seed: int = field(default=0, metadata={"help": "Seed of the random groups."})


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
class TrainArguments(FlowArguments):
    """What `hf-ensemble train` takes beside a trainer's own arguments and trl's model arguments."""

    group: str | None = field(
        default=None,
        metadata={"help": "Train this group alone; its groups have to be there: --until groups makes them."},
    )
    until: str = field(
        default="adapters",
        metadata={
            "help": "Last stage: 'groups' (gradients, one adapter for all, groups), or 'adapters'. `hf-ensemble run` "
            "goes on from either to weights and evaluation."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        check_one_of("until", self.until, ("groups", "adapters"))
        if self.target is not None:
            raise ConfigurationError(
                f"train is for the groups of an ensemble, and a selection trains once: found --target {self.target}. "
                "Use hf-ensemble run."
            )


@dataclass
class EvalArguments(FlowArguments):
    """What `hf-ensemble eval` takes beside a trainer's own arguments and trl's model arguments."""

    split: str = field(default="test", metadata={"help": "Rows to score: 'test', 'validation' or 'train'."})

    def __post_init__(self):
        super().__post_init__()
        check_one_of("split", self.split, SPLITS)


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


def needed(command: str, **given: Any) -> None:
    """Raise `ConfigurationError` for flags that a command does not work without."""
    lacking = [f"--{name}" for name, value in given.items() if value is None]
    if lacking:
        raise ConfigurationError(f"Expected {' and '.join(lacking)}; see hf-ensemble {command} --help.")


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


def print_all_help(classes: Sequence[type], command: str) -> None:
    """Print every argument of a command, those of the parents' trainers included."""
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
        known = [flag for action in parser._actions for flag in action.option_strings]
        near = [close for word in unknown for close in difflib.get_close_matches(word, known, n=1, cutoff=0.8)]
        meant = f" Did you mean {', '.join(near)}?" if near else ""
        raise ConfigurationError(f"Unknown arguments: {named}.{meant} See hf-ensemble {command} --help.")
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
