"""What a command of `hf-ensemble` is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command of `hf-ensemble`.

    Args:
        name (`str`): what is typed.
        help (`str`): one line for the list of commands.
        module (`str`): module with a function `main(argv)`, which runs the command; imported when it is called.
    """

    name: str
    help: str
    module: str

    def load(self) -> Callable[[Sequence[str]], object]:
        """The function that runs the command."""
        import importlib

        return importlib.import_module(self.module, __package__).main


COMMANDS = [
    Command("demo", "the whole flow on a small world of generated tasks, without a network", ".demo.flow"),
    Command("run", "the whole flow on a folder of JSONL tasks and a model", ".commands.run"),
    Command("fidelity", "fine-tune random subsets to see how far predictions can be trusted", ".commands.fidelity"),
    Command("select", "select tasks that help a target, from captured gradients", ".commands.select"),
    Command("group", "group tasks to train an adapter each, from captured gradients", ".commands.group"),
]
