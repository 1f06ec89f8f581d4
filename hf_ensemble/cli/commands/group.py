"""`hf-ensemble group`: groups of tasks to train one adapter each, from gradients that were captured before."""

from collections.abc import Sequence

from ...select import Grouping
from ..choice_arguments import GroupArguments
from ..choices import save_choice, selector_of
from ..parsing import parse
from ..tables import console, group_curve_table


def main(argv: Sequence[str]) -> Grouping:
    """Group the tasks; writes the grouping and its pictures.

    Raises:
        `HfEnsembleError`: for bad arguments and stores.
    """
    (arguments,), _ = parse([GroupArguments], argv, command="group")
    length, *others = arguments.continued_lengths() if arguments.group_initialization == "baseline" else [None]
    grouping = selector_of(arguments, continued_length=length, other_lengths=others).group(
        **arguments.group_arguments(), targets=arguments.target, seed=arguments.seed
    )
    out = console()
    out.print(group_curve_table(grouping))
    save_choice(grouping, arguments.output_dir, out)
    return grouping
