"""From the words of a command to its settings."""

import difflib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NoReturn, get_args, get_type_hints

from transformers import HfArgumentParser

from ..errors import ConfigurationError
from ..logging import get_logger
from .command import COMMANDS
from .help import names_of
from .words import Words

logger = get_logger(__name__)


def parse(
    classes: Sequence[type], argv: Sequence[str] | Words, remaining_allowed: bool = False, command: str = "run"
) -> tuple[list[Any], Words]:
    """Dataclasses from the command line and the `--config` file, and the options that none of them knows.

    The value `null` is None for numbers that may be None, and the default elsewhere. Options of the file that are for
    other commands are left out, with a warning.

    Raises:
        `ConfigurationError`: for values of the wrong type, and for unknown options, unless `remaining_allowed`.
    """
    words = argv if isinstance(argv, Words) else Words.of(argv)
    parser = _Parser(tuple(classes), prog=f"hf-ensemble {command}", allow_abbrev=False)
    known = {flag: action for action in parser._actions for flag in action.option_strings}
    line: list[str] = []
    others: dict[str, list[str]] = {}
    for name, values in words.options.items():
        action = known.get(f"--{name}")
        if action is None:
            others[name] = values
        elif action.nargs in (None, "?") and len(values) != 1:
            raise ConfigurationError(f"{name} in {words.file} takes one value, found {len(values)}. Correct it.")
        elif len(values) == 1 and values[0].startswith("-"):
            line.append(f"--{name}={values[0]}")
        else:
            line += [f"--{name}", *values]
    flags = _nulls(parser, classes, [*line, *words.line])
    *parsed, remaining = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True)
    left = Words(remaining, others, words.file)
    if not remaining_allowed:
        refuse_unknown(left, list(known), command)
    return parsed, left


def refuse_unknown(left: Words, known: Sequence[str], command: str) -> None:
    """Raise for words that no option takes, and for options of the file that no command has."""
    of_others = every_option() if left.options else frozenset()
    foreign = [name for name in left.options if name not in of_others]
    # Without their values: a token may be among them.
    unknown = [word.split("=")[0] for word in left.line if word.startswith("--")]
    if left.line or foreign:
        named = " ".join([*unknown, *(f"--{name}" for name in foreign)]) or "a word that belongs to no flag"
        where = f", in {left.file}" if foreign and not left.line else ""
        meant = [
            near
            for word in (*unknown, *(f"--{name}" for name in foreign))
            for near in difflib.get_close_matches(word, known, n=1, cutoff=0.8)
        ]
        did = f" Did you mean {', '.join(meant)}?" if meant else ""
        raise ConfigurationError(f"Unknown arguments: {named}{where}.{did} See hf-ensemble {command} --help.")
    if left.options:
        names = ", ".join(left.options)
        logger.warning("hf-ensemble %s leaves out what %s has for others: %s.", command, left.file, names)


@cache
def every_option() -> frozenset[str]:
    """Names of the options of all commands, those of the parents' trainers among them."""
    return frozenset().union(*map(names_of, COMMANDS))


class _Parser(HfArgumentParser):
    """A parser that raises its errors, which otherwise print every flag there is."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}. See {self.prog} --help.")


def _nulls(parser: HfArgumentParser, classes: Sequence[type], argv: list[str]) -> list[str]:
    """Let the parser read `null` for numbers that may be None; drop it for the other fields it knows."""
    hints = {name: hint for own in classes for name, hint in get_type_hints(own).items()}
    known = {flag: action for action in parser._actions for flag in action.option_strings}
    kept: list[str] = []
    for word in _split_nulls(argv):
        action = known.get(kept[-1]) if kept and word == "null" else None
        if action is None:
            kept.append(word)
            continue
        kinds = get_args(hints.get(action.dest))
        if {int, float} & {action.type, *kinds} and action.nargs is None and type(None) in kinds:
            action.type = _none_or(action.type)
            kept.append(word)
        else:
            kept.pop()
    return kept


def _split_nulls(argv: list[str]) -> list[str]:
    """`--name=null` as two words."""
    words: list[str] = []
    for word in argv:
        is_null = word.startswith("--") and word.endswith("=null")
        words += [word.removesuffix("=null"), "null"] if is_null else [word]
    return words


def _none_or(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text == "null" else kind(text)
