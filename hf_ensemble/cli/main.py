"""The `hf-ensemble` command."""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..errors import HfEnsembleError
from .command import COMMANDS
from .stopping import Terminated, print_last_line, sigterm_as_interrupt

_DESCRIPTION = (
    "Fine-tune a language model on many datasets at once: group them, train an adapter per group, ship the ensemble."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        `int`: 0 on success, 1 for an error of the user's input (printed in one line; `--debug` shows the traceback),
        130 when interrupted, 143 when terminated. Without a known command it exits with 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [flag for flag in argv if flag != "--debug"]
    parser = _Parser(prog="hf-ensemble", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"hf-ensemble {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        subparsers.add_parser(command.name, help=command.help, add_help=False)
    known, rest = parser.parse_known_args(argv)
    try:
        with sigterm_as_interrupt():
            _quiet()
            next(command for command in COMMANDS if command.name == known.command).load()(rest)
    except (HfEnsembleError, OSError, ValueError) as error:
        # The libraries below raise ValueError for bad arguments.
        if debug:
            raise
        # Some of their messages take several lines.
        print_last_line(f"hf-ensemble: {' '.join(str(error).split())}")
        return 1
    except KeyboardInterrupt as stop:
        print_last_line("hf-ensemble: stopped. Run the same command again to continue.")
        return 143 if isinstance(stop, Terminated) else 130
    return 0


class _Parser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See hf-ensemble --help.\n")


def _quiet() -> None:
    """One progress bar for long work; the bars and notices of the libraries below say nothing to the user."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
