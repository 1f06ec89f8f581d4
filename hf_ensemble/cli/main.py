"""The `hf-ensemble` command."""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence

from .. import __version__
from ..errors import HfEnsembleError

_DESCRIPTION = (
    "Fine-tune a language model on many datasets at once: group them, train an adapter per group, ship the ensemble."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        `int`: 0 on success, 1 for an error of the user's input (printed in one line; `--debug` shows the traceback).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [flag for flag in argv if flag != "--debug"]
    parser = argparse.ArgumentParser(prog="hf-ensemble", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"hf-ensemble {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="the whole flow on a small world of generated tasks, no network", add_help=False)
    commands.add_parser("run", help="the whole flow on a folder of JSONL tasks and a model path", add_help=False)
    help_text = "fine-tune random subsets for real, to see how far predictions are to be trusted"
    commands.add_parser("fidelity", help=help_text, add_help=False)
    commands.add_parser("select", help="choose tasks that help a target, from captured gradients", add_help=False)
    commands.add_parser("group", help="group tasks to train an adapter each, from captured gradients", add_help=False)
    known, rest = parser.parse_known_args(argv)
    try:
        _quiet()
        if known.command == "demo":
            from .demo.flow import demo

            demo(rest)
        elif known.command == "fidelity":
            from .fidelity import fidelity

            fidelity(rest)
        elif known.command == "select":
            from .choose import select

            select(rest)
        elif known.command == "group":
            from .choose import group

            group(rest)
        else:
            from .run import run

            run(rest)
    except (HfEnsembleError, OSError, ValueError) as error:
        # The libraries below raise ValueError for bad arguments.
        if debug:
            raise
        print(f"hf-ensemble: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hf-ensemble: stopped. The same command goes on where it stopped.", file=sys.stderr)
        return 130
    return 0


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
