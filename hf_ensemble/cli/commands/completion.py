"""`hf-ensemble completion`: a script that completes commands and options in a shell."""

import argparse
from collections.abc import Sequence

import shtab

from ..command import COMMANDS
from ..help import ALL, DESCRIPTION, GENERAL, MOST_USED, groups_of
from ..parsing import parse
from ..saved_arguments import CompletionArguments


def main(argv: Sequence[str]) -> None:
    """Print the script.

    Raises:
        `ConfigurationError`: for an unknown shell.
    """
    (arguments,), _ = parse([CompletionArguments], argv, command="completion")
    print(shtab.complete(command_line(), shell=arguments.shell))


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
