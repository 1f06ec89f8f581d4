"""The `hf-ensemble` command."""

import difflib
import json
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout

from .. import __version__
from ..errors import HfEnsembleError, RunLockedError, StageNotReadyError, StoreLockedError
from .command import COMMANDS, Command
from .help import command_help, main_help, names_of
from .stopping import Terminated, print_last_line, sigterm_as_interrupt
from .wording import in_terminal

# EX_TEMPFAIL of sysexits.h: the same command works later, so that a scheduler may start it again.
TRY_AGAIN = 75
_OF_OTHERS = (RunLockedError, StageNotReadyError, StoreLockedError)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        `int`: 0 on success, 1 for an error of the user's input (printed in one line; `--debug` shows the traceback),
        75 when other processes have to end first, 130 when interrupted, 143 when terminated. Without a known command it
        exits with 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    given = set(argv)
    argv = [word for word in argv if word not in ("--debug", "--json")]
    if argv[:1] in (["--help"], ["-h"]):
        raise SystemExit(print(main_help(), end=""))
    if argv[:1] == ["--version"]:
        raise SystemExit(print(f"hf-ensemble {__version__}"))
    command = _command(argv)
    rest = argv[1:]
    if {"-h", "--help"} & set(rest):
        raise SystemExit(print(command_help(command), end=""))
    if "--help-all" in rest:
        raise SystemExit(print(command_help(command, with_parents=True), end=""))
    try:
        with sigterm_as_interrupt():
            if not command.is_light:
                _quiet()
            # Trainers print their logs on stdout, which is the script's that reads JSON.
            with redirect_stdout(sys.stderr) if "--json" in given else nullcontext():
                result = command.load()(rest)
            if "--json" in given and result is not None:
                _print_json(result)
    except (HfEnsembleError, OSError, ValueError) as error:
        # The libraries below raise ValueError for bad arguments.
        if "--debug" in given:
            raise
        print_last_line(f"hf-ensemble: {in_terminal(error, names_of(command))}")
        return TRY_AGAIN if isinstance(error, _OF_OTHERS) else 1
    except KeyboardInterrupt as stop:
        print_last_line("hf-ensemble: stopped. Run the same command again to continue.")
        return 143 if isinstance(stop, Terminated) else 130
    return 0


def _command(argv: Sequence[str]) -> Command:
    """The command that is called; exits with 2 where there is none."""
    found = next((command for command in COMMANDS if argv and command.name == argv[0]), None)
    if found is None:
        names = [command.name for command in COMMANDS]
        near = difflib.get_close_matches(argv[0], names, n=1) if argv else []
        meant = f" Did you mean {near[0]!r}?" if near else ""
        said = repr(argv[0]) if argv else "none"
        message = f"hf-ensemble: expected a command, one of {', '.join(names)}; found {said}.{meant}"
        message += " See hf-ensemble --help."
        print(message, file=sys.stderr)
        raise SystemExit(2)
    return found


def _print_json(result: object) -> None:
    """What a command has made as one JSON object on stdout."""
    data = dict(result) if isinstance(result, Mapping) else result.to_dict()
    print(json.dumps(data, ensure_ascii=False, default=str), flush=True)


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
