"""`hf-ensemble completion`: a script that completes commands and options in a shell."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

import shtab

from ..._settings import check_one_of
from ...errors import ConfigurationError
from ..command import COMMANDS
from ..help import ALL, DESCRIPTION, GENERAL, MOST_USED, groups_of
from ..words import Words


@dataclass
class CompletionArguments:
    """What `hf-ensemble completion` takes."""

    shell: str = field(default="bash", metadata={"help": "The shell: bash, zsh or tcsh."})

    def __post_init__(self):
        check_one_of("shell", self.shell, ("bash", "zsh", "tcsh"))


def main(argv: Sequence[str]) -> dict[str, str]:
    """Print the script. Shells run this when they start, so nothing is imported that takes long.

    Returns:
        `dict`: the shell and its script.

    Raises:
        `ConfigurationError`: for an unknown shell, and for other options.
    """
    words = Words.of(argv)
    of_file = words.options.get("shell", ["bash"])
    if len(of_file) != 1:
        raise ConfigurationError(f"shell in {words.file} takes one value, found {len(of_file)}. Correct it.")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--shell", default=of_file[0])
    try:
        given, unknown = parser.parse_known_args(words.line)
    except argparse.ArgumentError as error:
        raise ConfigurationError(f"{error}. See hf-ensemble completion --help.") from error
    others = {name: values for name, values in words.options.items() if name != "shell"}
    if unknown or others:
        # It knows the options of all commands, which takes long.
        from ..parsing import refuse_unknown

        refuse_unknown(Words(unknown, others, words.file), ["--shell"], "completion")
    shell = CompletionArguments(given.shell).shell
    script = shtab.complete(command_line(), shell=shell)
    print(script)
    return {"shell": shell, "script": script}


def command_line() -> argparse.ArgumentParser:
    """The commands with their own options, as a parser that is only looked at."""
    parser = argparse.ArgumentParser(prog="hf-ensemble", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command")
    for command in COMMANDS:
        own = commands.add_parser(command.name, help=command.help, add_help=False)
        options = [option for group in groups_of(command).values() for option in group]
        parents = (*MOST_USED, ALL) if command.has_parents else ()
        known = {option.name for option in options}
        for option in (*options, *GENERAL, *(own for own in parents if own.name not in known)):
            # Only the first sentence, and no percent signs, which argparse would format.
            text = option.help.split(". ")[0].replace("%", "%%")
            action = own.add_argument(f"--{option.name}", help=text, metavar=option.metavar)
            if option.name in ("data", "config", "file", "store", "run", "ensemble") or option.name.endswith("_dir"):
                action.complete = shtab.FILE
    return parser
